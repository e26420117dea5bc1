"""Going on where a run stopped: model, optimizer and data position back to the newest whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unmask.distributed.ranks import ALONE, Ranks, from_first
from unmask.report.metrics import cut_after
from unmask.training.checkpoint import CheckpointConfig, find_checkpoint


class Positioned(Protocol):
    """Something whose position a checkpoint holds: the data loader."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...


@dataclass(frozen=True)
class ResumeParts:
    """The parts of a run that a checkpoint restores, and the log that is cut to match.

    Attributes:
        loader: the data.
        restore: puts model and optimizer back from a checkpoint's folder; with several ranks all call it.
        log: the run's metrics.jsonl.
        ranks: rank 0 looks for the checkpoint and checks it, and cuts the log.
    """

    loader: Positioned
    restore: Callable[[Path], None]
    log: Path
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on: steps already made, the checkpoint they came from, and newer ones refused."""

    step: int
    folder: Path | None
    refused: tuple[str, ...]


def resume(root: Path, section: CheckpointConfig, identity: Mapping[str, Any], parts: ResumeParts) -> ResumePoint:
    """Put a run back to its newest usable checkpoint, if it has one.

    Model, optimizer and data position are restored; the noise needs no state, being keyed by (seed, epoch, sample).
    Events of steps after the checkpoint are cut from the log.

    Raises:
        CheckpointError: there are checkpoints, but none that can be used.
    """
    found = from_first(parts.ranks, lambda: find_checkpoint(root, identity) if section.enabled else None)
    if found is None:
        if parts.ranks.first:
            cut_after(parts.log, -1)
        return ResumePoint(0, None, ())
    parts.restore(found.folder)
    parts.loader.load_state_dict(found.state["loader"])
    if parts.ranks.first:
        cut_after(parts.log, found.state["step"])
    return ResumePoint(found.state["step"], found.folder, found.refused)
