"""The training loop. From here: corruption and loss are the objective's (`step.objective`), the network is `model`.

    rows → loader → micro-batches of one global batch → train_step → metrics.jsonl
                                                     ↘ every so many steps: evaluation, checkpoint

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
from unmask.config.results import CheckpointConfig
from unmask.config.training import LRSchedulerConfig, StepSchedulerConfig
from unmask.distributed.runtime import Runtime
from unmask.errors import DataError, TrainingError
from unmask.objectives.registry import Objective
from unmask.report.metrics import MetricsLog, SilentLog
from unmask.report.progress import TrainingProgress
from unmask.rng import NoiseStream, key
from unmask.training.best import Best
from unmask.training.evaluate import Validator, due_after, evaluate
from unmask.training.optim import set_learning_rate
from unmask.training.resume import ResumePoint
from unmask.training.saver import Saver
from unmask.training.schedule import due, learning_rate
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
        saver: writes checkpoints.
        validators: what is measured, and how often.
        metrics, progress: where numbers go.
        name_rows: names rows by their sample ids, for an error message.
        is_good_enough: told what was measured at a step; True ends the run.
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
    progress: TrainingProgress
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
        best: the best evaluation by `checkpoint.best_metric`; None without one.
    """

    step: int
    reason: str
    checkpoint: Path | None
    best: Best | None = None


def train(run: TrainingRun, start: ResumePoint) -> TrainingOutcome:
    """Train from `start` to the end, to a good-enough validation, or to a signal.

    Raises:
        TrainingError: a loss or gradient that is not finite (the step, its rows and the last good checkpoint are
            named), or memory ran out in a step.
        CheckpointError: a checkpoint could not be saved.
    """
    if start.step >= run.total_steps:
        return TrainingOutcome(start.step, "already finished", start.folder, start.best)
    try:
        return _train(run, start)
    except BaseException:
        run.saver.abandon()
        raise


def _train(run: TrainingRun, start: ResumePoint) -> TrainingOutcome:
    step, ranks, reason, best = start.step, run.runtime.ranks, "finished", start.best
    stream = iter(run.loader)
    with StopRequest() as stop, run.progress, contextlib.closing(stream):
        if run.steps.val_at_start and step == 0:
            evaluate(run, step, run.validators, best)
        while step < run.total_steps:
            began = time.perf_counter()
            try:
                batches = next(stream)
            except DataError:
                if stop.name is None or ranks.size > 1:
                    raise
                reason = stop.name  # the signal reached the data workers too
                break
            step += 1
            rate = learning_rate(step, run.schedule, run.peak_lr, run.total_steps)
            set_learning_rate(run.optimizer, rate)
            # Dropout, the one user of the global generator, draws the same after a resume as without one. Ranks have
            # different rows and draw apart.
            torch.manual_seed(key(run.noise.seed, "dropout", epoch=ranks.rank, sample=step) % 2**32)
            result = _step(run, step, batches)
            if not result.finite:
                raise _not_finite(run, step, result, batches)
            _record(run, step, rate, result, time.perf_counter() - began)
            found = evaluate(run, step, due_after(run.validators, step), best)
            best = found.best
            stopped = stop.agreed(ranks)
            if found.good or stopped is not None:
                reason = stopped or "good enough"
                break
            if step < run.total_steps and (found.is_best or due(step, run.steps.ckpt_every_steps)):
                _save(run, step, best, last=False)
            _tell_saved(run)
        if reason == "finished":
            rest = [validator for validator in run.validators if not due(step, validator.every)]
            best = evaluate(run, step, rest, best).best
        if step > start.step:
            _save(run, step, best, last=reason in ("finished", "good enough"))
        run.saver.settle()
        _tell_saved(run)
        run.metrics.write("data", step=step, dropped_rows=dict(run.loader.dropped))
        run.metrics.write("end", step=step, reason=reason)
    return TrainingOutcome(step, reason, run.saver.newest, best)


def _step(run: TrainingRun, step: int, batches: Sequence[Batch]) -> StepResult:
    try:
        return train_step(
            run.model,
            run.objective,
            batches,
            run.noise,
            run.optimizer,
            run.runtime,
            run.max_norm,
            run.defer_grad_sync,
        )
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise _out_of_memory(run, step) from error


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


def _save(run: TrainingRun, step: int, best: Best | None, last: bool) -> None:
    if run.checkpoint.enabled:
        state = {"loader": run.loader.state_dict(), "identity": dict(run.identity)}
        run.saver.save(step, {**state, "best": None if best is None else best.to_state()}, last)


def _tell_saved(run: TrainingRun) -> None:
    """Say which checkpoint is complete; record how long a save in the background took, and held the step up."""
    for news in run.saver.poll():
        run.progress.say(f"step {news['step']}  saved {news['folder']}")
        run.metrics.write("checkpoint", **{**news, "folder": news["folder"].name})


def _not_finite(run: TrainingRun, step: int, result: StepResult, batches: Sequence[Batch]) -> TrainingError:
    own = [sample for batch in batches for sample in batch.sample_ids_B.tolist()]
    everyone = [sample for ids in run.runtime.ranks.gather(own) for sample in ids]
    run.saver.abandon()  # which may be about to complete the last good checkpoint
    run.metrics.write("stopped", step=step, reason="not finite")  # NaN has no place in JSON, so no value
    return TrainingError(
        f"step {step}: the loss ({result.loss}) or the gradient norm ({result.grad_norm}) is not finite, and training "
        f"stopped before the update. Rows of this step: {run.name_rows(everyone)}. Last good checkpoint: "
        f"{run.saver.newest or 'none yet'}. Lower optimizer.lr, add lr_scheduler.lr_warmup_steps or look at these rows"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a device or the CPU allocator, which has no exception of its own, refused memory."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in said and ("can't allocate memory" in said or "not enough memory" in said)
    )


def _out_of_memory(run: TrainingRun, step: int) -> TrainingError:
    run.saver.abandon()
    run.metrics.write("stopped", step=step, reason="out of memory")
    return TrainingError(
        f"step {step}: memory ran out on {run.runtime.device}. Lower step_scheduler.local_batch_size (the result stays "
        "the same), set distributed.activation_checkpointing: true, or lower dataset.seq_length, then run again. Last "
        f"checkpoint: {run.saver.newest or 'none yet'}"
    )
