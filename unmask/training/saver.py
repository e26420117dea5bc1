"""What the training loop needs of checkpoints, and how one process meets it: save now, return when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from unmask.config.results import CheckpointConfig
from unmask.training.checkpoint import prune, save_checkpoint
from unmask.training.optimizer_state import save_optimizer


class Saver(Protocol):
    """Saves checkpoints of a run, at once or in the background."""

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that is complete; None when there is none yet."""
        ...

    def save(self, step: int, state: Mapping[str, Any], last: bool) -> None:
        """Save a step, or begin to: the model may change as soon as this returns.

        Args:
            step: steps made.
            state: data position and identity, JSON-able.
            last: the run has come to its end with this step.
        """
        ...

    def poll(self) -> list[dict[str, Any]]:
        """Return what there is to say of each save that has become complete since the last call."""
        ...

    def settle(self) -> None:
        """Wait for a save under way."""
        ...

    def abandon(self) -> None:
        """Give a save under way a last chance, without an error of its own: the run has failed."""
        ...


class LocalSaver:
    """Saves the whole model in this process.

    Args:
        root: the run directory.
        section: the `checkpoint` section.
        model, optimizer: what is saved.
        write_model: writes the model as a folder that inference reads.
        newest: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        root: Path,
        section: CheckpointConfig,
        model: nn.Module,
        optimizer: Optimizer,
        write_model: Callable[[Path], None],
        newest: Path | None,
    ) -> None:
        self.newest = newest
        self._root, self._section = root, section
        self._model, self._optimizer, self._write_model = model, optimizer, write_model
        self._news: list[dict[str, Any]] = []

    def save(self, step: int, state: Mapping[str, Any], last: bool) -> None:
        """Save a step; raises CheckpointError."""

        def write(folder: Path) -> None:
            self._write_model(folder)
            save_optimizer(self._model, self._optimizer, folder)

        self.newest = save_checkpoint(self._root, step, state, write)
        prune(self._root, self._section.max_recent_checkpoints, self.newest)
        self._news.append({"step": step, "folder": self.newest})

    def poll(self) -> list[dict[str, Any]]:
        """Return {step, folder} of each save since the last call."""
        news, self._news = self._news, []
        return news

    def settle(self) -> None:
        """Return at once: nothing goes on in the background."""

    def abandon(self) -> None:
        """Return at once."""
