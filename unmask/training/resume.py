"""Going on where a run stopped: model, optimizer and data position back to the newest whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unmask.config.results import CheckpointConfig
from unmask.distributed.ranks import ALONE, Ranks, from_first
from unmask.report.metrics import cut_after
from unmask.training.best import LINK, Best, from_state
from unmask.training.checkpoint import find_checkpoint, point


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
        logs: files of events, which are cut to match: metrics.jsonl and samples.jsonl.
        ranks: rank 0 looks for the checkpoint and checks it, and cuts the log.
    """

    loader: Positioned
    restore: Callable[[Path], None]
    logs: tuple[Path, ...]
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        step: steps already made.
        folder: the checkpoint that they came from; None for a new run.
        refused: newer checkpoints that could not be used.
        best: the best evaluation so far.
        notes: what else a person should know.
    """

    step: int
    folder: Path | None
    refused: tuple[str, ...]
    best: Best | None = None
    notes: tuple[str, ...] = ()


def resume(root: Path, section: CheckpointConfig, identity: Mapping[str, Any], parts: ResumeParts) -> ResumePoint:
    """Put a run back to its newest usable checkpoint, if it has one.

    Model, optimizer and data position are restored; the noise needs no state, being keyed by (seed, epoch, sample).
    Events of steps after the checkpoint are cut from the log.

    Raises:
        CheckpointError: there are checkpoints, but none that can be used.
    """
    newest = from_first(parts.ranks, lambda: find_checkpoint(root, identity) if section.enabled else None)
    if newest is None:
        _cut(parts, -1)
        return ResumePoint(0, None, ())
    parts.restore(newest.folder)
    parts.loader.load_state_dict(newest.state["loader"])
    _cut(parts, newest.state["step"])
    best, notes = from_first(parts.ranks, lambda: _restore_best(root, from_state(newest.state, section.best_metric)))
    return ResumePoint(newest.state["step"], newest.folder, newest.refused, best, notes)


def _cut(parts: ResumeParts, step: int) -> None:
    for log in parts.logs if parts.ranks.first else ():
        cut_after(log, step)


def _restore_best(root: Path, best: Best | None) -> tuple[Best | None, tuple[str, ...]]:
    """Put the link `best` where the checkpoint's state says; forget an evaluation whose checkpoint is gone."""
    if best is None:
        return None, ()
    name = f"step_{best.step}"
    if not (root / name).is_dir():
        return None, (f"{root / name}, the best by {best.metric}, is gone; the next evaluation is the best anew",)
    point(root, LINK, name)
    return best, ()
