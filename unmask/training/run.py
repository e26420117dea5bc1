"""One training run: everything that the loop needs, where it goes on after an earlier stop, and how it ended."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from unmask.batch import Batch
from unmask.config.results import CheckpointConfig
from unmask.config.training import LRSchedulerConfig, StepSchedulerConfig
from unmask.data.check import Checked
from unmask.distributed.ranks import ALONE, Ranks, from_first
from unmask.distributed.runtime import Runtime
from unmask.errors import CheckpointError
from unmask.objectives.registry import Objective
from unmask.report.metrics import MetricsLog, SilentLog, cut_after
from unmask.report.progress import TrainingProgress
from unmask.rng import NoiseStream
from unmask.training.checkpoint import BEST, SEEN_WITHIN, Best, find_checkpoint, point, stored_best
from unmask.training.flops import Peak, StepFlops
from unmask.training.profiling import StepProfiler
from unmask.training.saver import Saver

_NONCE = ".shared"  # file in a run directory while ranks find out whether they share it


class Loader(Protocol):
    """What the loop needs of the data: the micro-batches of each step, and a position to save."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many rows were passed over, by reason."""
        ...

    @property
    def noted(self) -> Mapping[str, int]:
        """How many rows say something that nothing learns, by what it is."""
        ...

    @property
    def examples(self) -> Mapping[str, str]:
        """For each of these, the first such row."""
        ...

    def __iter__(self) -> Generator[list[Batch]]:
        """Yield each step's micro-batches from the current position on, without end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step returned, JSON-able."""
        ...

    def reconcile(self, state: Mapping[str, Any], accept_changed: bool) -> tuple[dict[str, Any], str | None]:
        """Return a saved position brought up to date with the data as they are now, and how they changed; None = not.

        Raises:
            DataError: rows that were trained on have changed, and `accept_changed` is False.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...

    def never_seen(self, total_steps: int) -> str | None:
        """Say which rows a run of so many steps never reaches, where that is known."""
        ...


@dataclass(frozen=True)
class Validator:
    """One kind of measurement.

    Attributes:
        event: the kind of event that it is recorded as.
        every: how often, in steps; None = at the end of the run only.
        measure: (network, steps made) → the event's fields, the same on every rank.
    """

    event: str
    every: int | None
    measure: Callable[[nn.Module, int], Mapping[str, Any]]


@dataclass(frozen=True)
class TrainingRun:
    """One assembled run.

    Attributes:
        root: the run directory.
        total_steps: the length that `steps` resolves to.
        identity: a checkpoint of another identity is foreign.
        checked: its rows, before the first step; None where that was done when the run began.
        count_flops: counts the operations of a micro-batch.
        peak: what MFU compares with.
        profiler: profiles some steps, if the run was asked to.
        name_rows: names rows by their sample ids, for an error message.
        is_good_enough: called with what was measured at a step; True ends the run.
        defer_grad_sync: several ranks sum their gradients once a step instead of at every micro-batch.
    """

    root: Path
    model: nn.Module
    objective: Objective
    loader: Loader
    optimizer: Optimizer
    noise: NoiseStream
    runtime: Runtime
    steps: StepSchedulerConfig
    total_steps: int
    schedule: LRSchedulerConfig
    peak_lr: float
    max_norm: float | None
    checkpoint: CheckpointConfig
    identity: Mapping[str, Any]
    saver: Saver
    validators: Sequence[Validator]
    metrics: MetricsLog | SilentLog
    checked: Checked | None
    progress: TrainingProgress
    count_flops: StepFlops
    peak: Peak
    profiler: StepProfiler
    name_rows: Callable[[Sequence[int]], str]
    is_good_enough: Callable[[Mapping[str, Any]], bool] = field(default=lambda _: False)
    defer_grad_sync: bool = True


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended.

    Attributes:
        step: the last step made.
        reason: `finished`, `good enough`, the name of the signal that stopped it, or `already finished` when there was
            nothing left to do.
        checkpoint: the folder saved last; None when checkpoints are off.
    """

    step: int
    reason: str
    checkpoint: Path | None
    best: Best | None = None


@dataclass(frozen=True)
class ResumeParts:
    """The parts of a run that a checkpoint restores, and the logs that are cut to match.

    Attributes:
        restore: puts model and optimizer back from a checkpoint's folder; with several ranks all call it.
        logs: files of events: metrics.jsonl and samples.jsonl.
        ranks: they check the checkpoint together; rank 0 reads its state and cuts the logs.
    """

    loader: Loader
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
        notes: what else a person should know.
        changed_data: how the data have changed since; None = they have not.
    """

    step: int
    folder: Path | None
    refused: tuple[str, ...]
    best: Best | None = None
    notes: tuple[str, ...] = ()
    changed_data: str | None = None


def check_shared(root: Path, ranks: Ranks) -> None:
    """Refuse a run directory that is not one folder for all ranks; a collective, while rank 0 holds the directory.

    Raises:
        CheckpointError: naming the ranks and machines that do not see it; the same message on every rank.
    """
    path, nonce = root / _NONCE, ""
    if ranks.first:
        nonce = secrets.token_hex(16)
        path.write_text(nonce)
    machine, place = socket.gethostname(), str(root.resolve())
    first, place, nonce = ranks.gather_results((machine, place, nonce))[0]
    until = time.monotonic() + SEEN_WITHIN
    while not (seen := _holds(path, nonce)) and time.monotonic() < until:
        time.sleep(0.1)
    everyone = ranks.gather_results((machine, seen))
    if ranks.first:
        path.unlink(missing_ok=True)
    blind: dict[str, list[str]] = {}
    for rank, (name, saw) in enumerate(everyone):
        if not saw:
            blind.setdefault(name, []).append(str(rank))
    if blind:
        who = "; ".join(f"rank{'s' * (len(some) > 1)} {', '.join(some)} on {name}" for name, some in blind.items())
        raise CheckpointError(
            f"checkpoint.checkpoint_dir: {place}, where rank 0 on {first} trains, is another folder for {who}; choose "
            "one on a file system that all machines share, by the same path on each"
        )


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except (OSError, ValueError):
        return False


def resume(root: Path, section: CheckpointConfig, identity: Mapping[str, Any], parts: ResumeParts) -> ResumePoint:
    """Put a run back to its newest usable checkpoint, if it has one.

    Model, optimizer and data position are restored; the noise needs no state, being keyed by (seed, epoch, sample).
    Events of steps after the checkpoint are cut from the log.

    Raises:
        CheckpointError: there are checkpoints, but none that can be used.
    """
    reconcile = partial(parts.loader.reconcile, accept_changed=section.accept_changed_data)
    ranks = None if parts.ranks.size == 1 else parts.ranks
    newest = find_checkpoint(root, identity, reconcile, ranks) if section.enabled else None
    if newest is None:
        return ResumePoint(0, None, (), notes=_cut(parts, -1))
    parts.restore(newest.folder)
    parts.loader.load_state_dict(newest.state["loader"])
    cut = _cut(parts, newest.state["step"])
    best, notes = from_first(parts.ranks, lambda: _restore_best(root, stored_best(newest.state, section.best_metric)))
    return ResumePoint(newest.state["step"], newest.folder, newest.refused, best, (*cut, *notes), newest.changed_data)


def _cut(parts: ResumeParts, step: int) -> tuple[str, ...]:
    """Cut the logs; return what is to be said about them, on rank 0."""
    return tuple(filter(None, (cut_after(log, step) for log in parts.logs if parts.ranks.first)))


def _restore_best(root: Path, best: Best | None) -> tuple[Best | None, tuple[str, ...]]:
    """Put the link `best` where the checkpoint's state says; forget an evaluation whose checkpoint is gone."""
    if best is None:
        return None, ()
    name = f"step_{best.step}"
    if not (root / name).is_dir():
        return None, (f"{root / name}, the best by {best.metric}, is gone; the next evaluation is the best anew",)
    point(root, BEST, name)
    return best, ()
