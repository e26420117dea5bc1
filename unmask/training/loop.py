"""The training loop. From here: corruption and loss are the objective's (`step.objective`), the network is `model`.

    rows → loader → micro-batches of one global batch → train_step → metrics.jsonl
                                                     ↘ every so many steps: validation, checkpoint

Everything that the loop needs arrives assembled in a `TrainingRun`; nothing is looked up here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from unmask.batch import Batch
from unmask.distributed.runtime import Runtime
from unmask.errors import DataError, TrainingError
from unmask.objectives.registry import Objective
from unmask.report.metrics import MetricsLog
from unmask.report.progress import TrainingProgress
from unmask.rng import NoiseStream, key
from unmask.training.checkpoint import CheckpointConfig, prune, save_checkpoint
from unmask.training.optim import set_learning_rate
from unmask.training.optimizer_state import save_optimizer
from unmask.training.resume import ResumePoint
from unmask.training.schedule import LRSchedulerConfig, StepSchedulerConfig, due, learning_rate
from unmask.training.signals import StopRequest
from unmask.training.step import StepResult, train_step


class Loader(Protocol):
    """What the loop needs of the data: the micro-batches of each step, and a position to save."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many rows were passed over, by reason."""
        ...

    @property
    def examples(self) -> Mapping[str, str]:
        """For each reason, the first such row."""
        ...

    def __iter__(self) -> Generator[list[Batch]]:
        """Yield each step's micro-batches from the current position on, without end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step returned, JSON-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...


@dataclass(frozen=True)
class TrainingRun:
    """One assembled run.

    Attributes:
        root: the run directory.
        model, objective, loader, optimizer, noise, runtime: the parts of a step.
        steps: sizes and intervals; `total_steps` is the length they resolve to.
        schedule, peak_lr, max_norm: the optimizer's settings that change or limit a step.
        checkpoint: what is kept, under which identity (a checkpoint of another identity is foreign).
        write_model: writes the model as a Hugging Face folder; `read_model` puts such a folder's weights back.
        validators: each takes the model and returns the fields of a validation event.
        metrics, progress: where numbers go.
        name_rows: says which rows a batch holds, for an error message.
        is_good_enough: told each validation event; True ends the run.
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
    write_model: Callable[[Path], None]
    read_model: Callable[[Path], None]
    validators: Sequence[Callable[[nn.Module], Mapping[str, float]]]
    metrics: MetricsLog
    progress: TrainingProgress
    name_rows: Callable[[Sequence[Batch]], str]
    is_good_enough: Callable[[Mapping[str, Any]], bool] = field(default=lambda _: False)


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


def train(run: TrainingRun, start: ResumePoint) -> TrainingOutcome:
    """Train from `start` to the end, to a good-enough validation, or to a signal.

    Raises:
        TrainingError: a loss or gradient that is not finite (the step, its rows and the last good checkpoint are
            named), or memory ran out in a step.
        CheckpointError: a checkpoint could not be saved.
    """
    step, saved = start.step, start.folder
    if step >= run.total_steps:
        return TrainingOutcome(step, "already finished", saved)
    reason = "finished"
    stream = iter(run.loader)
    with StopRequest() as stop, run.progress, contextlib.closing(stream):
        if run.steps.val_at_start and step == 0:
            _validate(run, step)
        while step < run.total_steps:
            began = time.perf_counter()
            try:
                batches = next(stream)
            except DataError:
                if stop.name is None:
                    raise
                reason = stop.name  # the signal reached the data workers too
                break
            step += 1
            rate = learning_rate(step, run.schedule, run.peak_lr, run.total_steps)
            set_learning_rate(run.optimizer, rate)
            # Dropout, the one user of the global generator, draws the same after a resume as without one.
            torch.manual_seed(key(run.noise.seed, "dropout", sample=step) % 2**32)
            try:
                result = train_step(
                    run.model, run.objective, batches, run.noise, run.optimizer, run.runtime, run.max_norm
                )
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise _out_of_memory(run, step, saved) from error
            if not result.finite:
                raise _not_finite(run, step, result, batches, saved)
            _record(run, step, rate, result, time.perf_counter() - began)
            good = due(step, run.steps.val_every_steps) and _validate(run, step)
            if good or stop.name is not None:
                reason = stop.name or "good enough"
                break
            if due(step, run.steps.ckpt_every_steps) and step < run.total_steps:
                saved = _save(run, step)
        if reason == "finished" and not due(step, run.steps.val_every_steps):
            _validate(run, step)
        if step > start.step:
            saved = _save(run, step)
        run.metrics.write("data", step=step, dropped_rows=dict(run.loader.dropped))
        run.metrics.write("end", step=step, reason=reason)
    return TrainingOutcome(step, reason, saved)


def _record(run: TrainingRun, step: int, rate: float, result: StepResult, seconds: float) -> None:
    speed = result.tokens / seconds
    run.metrics.write(
        "train",
        step=step,
        loss=result.loss,
        **{f"{name}_loss": value for name, value in result.losses.items()},
        grad_norm=result.grad_norm,
        lr=rate,
        tokens=result.tokens,
        supervised_tokens=result.supervised_tokens,
        tokens_per_second=round(speed, 1),
        memory_gib=round(run.runtime.memory_gib(), 3),
    )
    run.progress.step(step, result.loss, rate, result.grad_norm, speed)


def _validate(run: TrainingRun, step: int) -> bool:
    """Run every validator, record the event, and say whether the run may end."""
    if not run.validators:
        return False
    event: dict[str, Any] = {}
    began = time.perf_counter()
    for validator in run.validators:
        event.update(validator(run.model))
    run.metrics.write("validation", step=step, **event, seconds=round(time.perf_counter() - began, 3))
    run.progress.say(f"step {step}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in event.items()))
    return run.is_good_enough(event)


def _save(run: TrainingRun, step: int) -> Path | None:
    if not run.checkpoint.enabled:
        return None

    def write(folder: Path) -> None:
        run.write_model(folder)
        save_optimizer(run.model, run.optimizer, folder)

    state = {"loader": run.loader.state_dict(), "identity": dict(run.identity)}
    folder = save_checkpoint(run.root, step, state, write)
    prune(run.root, run.checkpoint.max_recent_checkpoints, folder)
    run.progress.say(f"step {step}  saved {folder}")
    return folder


def _not_finite(
    run: TrainingRun, step: int, result: StepResult, batches: Sequence[Batch], saved: Path | None
) -> TrainingError:
    run.metrics.write("stopped", step=step, reason="not finite")  # NaN has no place in JSON, so no value
    return TrainingError(
        f"step {step}: the loss ({result.loss}) or the gradient norm ({result.grad_norm}) is not finite, and training "
        f"stopped before the update. Rows of this step: {run.name_rows(batches)}. Last good checkpoint: "
        f"{saved or 'none yet'}. Lower optimizer.lr, add lr_scheduler.lr_warmup_steps or look at these rows"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a device or the CPU allocator, which has no exception of its own, refused memory."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in said and ("can't allocate memory" in said or "not enough memory" in said)
    )


def _out_of_memory(run: TrainingRun, step: int, saved: Path | None) -> TrainingError:
    run.metrics.write("stopped", step=step, reason="out of memory")
    return TrainingError(
        f"step {step}: memory ran out on {run.runtime.device}. Lower step_scheduler.local_batch_size (the result stays "
        "the same), set distributed.activation_checkpointing: true, or lower dataset.seq_length, then run again. Last "
        f"checkpoint: {saved or 'none yet'}"
    )
