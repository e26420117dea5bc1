"""The training loop. From here: corruption and loss are the objective's (`step.objective`), the network is `model`.

    rows → loader → micro-batches of one global batch → train_step → metrics.jsonl
                                                     ↘ every so many steps: evaluation, checkpoint

Everything that the loop needs arrives assembled in a `TrainingRun`; nothing is looked up here.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.profiler import record_function

from unmask.batch import Batch
from unmask.config.training import LRSchedulerConfig
from unmask.distributed.ranks import Ranks
from unmask.errors import DataError, TrainingError, is_out_of_memory
from unmask.rng import key
from unmask.training.checkpoint import Best, better
from unmask.training.optim import set_learning_rate
from unmask.training.run import ResumePoint, TrainingOutcome, TrainingRun, Validator
from unmask.training.step import DATA, StepResult, train_step


def train(run: TrainingRun, start: ResumePoint) -> TrainingOutcome:
    """Train from `start` to the end, to a good-enough validation, or to a signal.

    Raises:
        TrainingError: a loss or gradient that is not finite (the step, its rows and the last good checkpoint are
            named), or memory ran out in a step.
        DataError: a row that cannot be trained on; the steps before it are saved.
        CheckpointError: a checkpoint could not be saved.
    """
    if start.step >= run.total_steps:
        return TrainingOutcome(start.step, "already finished", start.folder, start.best)
    try:
        return _train(run, start)
    except BaseException:
        run.saver.wait_briefly()
        raise


def _train(run: TrainingRun, start: ResumePoint) -> TrainingOutcome:
    step, ranks, reason, best = start.step, run.runtime.ranks, "finished", start.best
    saved, problem, position = step, None, run.loader.state_dict()
    stream = iter(run.loader)
    with StopRequest() as stop, run.progress, contextlib.closing(stream), run.profiler:
        if run.steps.val_at_start and step == 0:
            _evaluate(run, step, run.validators, best)
        while step < run.total_steps:
            began, waited = time.perf_counter(), ranks.waited.seconds
            with record_function(DATA):
                batches, problem = _next_batches(run, stream)
            data_seconds = time.perf_counter() - began - (ranks.waited.seconds - waited)
            if problem is not None:
                stopped = stop.agreed(ranks)
                if stopped is not None:  # the signal reached the data workers too
                    reason, problem = stopped, None
                break
            position = run.loader.state_dict()
            step += 1
            rate = learning_rate(step, run.schedule, run.peak_lr, run.total_steps)
            set_learning_rate(run.optimizer, rate)
            # Dropout, the one user of the global generator before the update, draws the same after a resume as without
            # one. Ranks have different rows and draw apart.
            torch.manual_seed(key(run.noise.seed, "dropout", epoch=ranks.rank, sample=step) % 2**32)
            result = _step(run, step, batches)
            if not result.finite:
                raise _not_finite(run, step, result, batches)
            exchange_seconds = ranks.waited.seconds - waited
            _record(run, step, rate, result, time.perf_counter() - began, data_seconds, exchange_seconds)
            run.profiler.made(step)
            measured = _evaluate(run, step, [one for one in run.validators if due(step, one.every)], best)
            best = measured.best
            stopped = stop.agreed(ranks)
            if measured.good or stopped is not None:
                reason = stopped or "good enough"
                break
            if step < run.total_steps and (measured.is_best or due(step, run.steps.ckpt_every_steps)):
                _save(run, step, position, best, last=False)
                saved = step
            _report_saved(run)
        if reason == "finished" and problem is None:
            rest = [validator for validator in run.validators if not due(step, validator.every)]
            best = _evaluate(run, step, rest, best).best
        if step > saved:
            _save(run, step, position, best, last=problem is None and reason in ("finished", "good enough"))
        run.saver.wait()
        _report_saved(run)
        if problem is not None:
            run.metrics.write("stopped", step=step, reason="data")
            ranks.barrier()  # the first one that ends, ends the others
            raise DataError(f"{problem}. {_goes_on(run, step)}")
        _record_lost_output(run, step)
        run.metrics.write("data", step=step, dropped_rows=dict(run.loader.dropped))
        run.metrics.write("end", step=step, reason=reason)
    return TrainingOutcome(step, reason, run.saver.newest, best)


def _next_batches(run: TrainingRun, stream: Iterator[list[Batch]]) -> tuple[list[Batch], str | None]:
    """Return the next step's micro-batches, or what is wrong with the data of some rank, the same on all."""
    batches, problem = [], None
    try:
        batches = next(stream)
    except DataError as error:
        problem = str(error)
    if run.runtime.ranks.largest(0 if problem is None else 1):
        problems = run.runtime.ranks.gather(problem)
        rank, problem = next((rank, each) for rank, each in enumerate(problems) if each is not None)
        if None in problems:
            problem += f" (on rank {rank} alone)"
    return batches, problem


def _goes_on(run: TrainingRun, step: int) -> str:
    """Say where the same command goes on once the data are mended."""
    if not run.checkpoint.enabled:
        return "Nothing was saved: checkpoint.enabled is false"
    if run.saver.newest is None:
        return "No step was made yet"
    return f"Step {step} is saved in {run.saver.newest}: the same command goes on from there"


def _step(run: TrainingRun, step: int, batches: Sequence[Batch]) -> StepResult:
    try:
        parts = (run.model, run.objective, batches, run.noise, run.optimizer, run.runtime)
        return train_step(*parts, run.max_norm, run.defer_grad_sync, run.count_flops)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(run, step) from error


@dataclass(frozen=True)
class _Evaluation:
    """What the measurements of one step came to; `good`: the run may end here."""

    good: bool
    best: Best | None
    is_best: bool


def _evaluate(run: TrainingRun, step: int, validators: Sequence[Validator], best: Best | None) -> _Evaluation:
    """Measure, record each event, and compare with the best so far."""
    measured: dict[str, Mapping[str, Any]] = {}
    for validator in validators:
        began = time.perf_counter()
        fields = dict(validator.measure(run.model, step))
        measured[validator.event] = fields
        run.metrics.write(validator.event, step=step, **fields, seconds=round(time.perf_counter() - began, 3))
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in fields.items() if isinstance(value, float))
        label = "" if validator.event in fields else f"{validator.event}  "
        run.progress.say(f"step {step}  {label}{numbers}")
    better_now = better(run.checkpoint.best_metric, best, measured, step)
    if better_now is not None:
        run.metrics.write("best", step=step, metric=better_now.metric, value=better_now.value)
        run.progress.say(f"step {step}  best {better_now.metric} so far")
    together = {name: value for fields in measured.values() for name, value in fields.items()}
    return _Evaluation(bool(measured) and run.is_good_enough(together), better_now or best, better_now is not None)


def _record(
    run: TrainingRun,
    step: int,
    rate: float,
    result: StepResult,
    seconds: float,
    data_seconds: float,
    exchange_seconds: float,
) -> None:
    speed, devices = result.tokens / seconds, run.runtime.ranks.size
    exchange = {"exchange_seconds": round(exchange_seconds, 4)} if devices > 1 else {}
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
        tokens_per_second_per_device=round(speed / devices, 1),
        mfu=round(result.flops / seconds / devices / run.peak.flops, 4),
        data_seconds=round(data_seconds, 4),
        **exchange,
        memory_gib=round(run.runtime.memory_gib(), 3),
    )
    run.progress.step(step, result.loss, rate, result.grad_norm, speed)
    _record_lost_output(run, step)


def _record_lost_output(run: TrainingRun, step: int) -> None:
    for problem in run.progress.newly_lost():
        run.metrics.write("output", step=step, problem=problem)


def _save(run: TrainingRun, step: int, position: Mapping[str, Any], best: Best | None, last: bool) -> None:
    if run.checkpoint.enabled:
        state = {"loader": position, "identity": dict(run.identity)}
        run.saver.save(step, {**state, "best": None if best is None else asdict(best)}, last)


def _report_saved(run: TrainingRun) -> None:
    """Say which checkpoint is complete; record how long a save in the background took, and held the step up."""
    for news in run.saver.poll():
        run.progress.say(f"step {news['step']}  saved {news['folder']}")
        run.metrics.write("checkpoint", **{**news, "folder": news["folder"].name})


def _not_finite(run: TrainingRun, step: int, result: StepResult, batches: Sequence[Batch]) -> TrainingError:
    local = [sample for batch in batches for sample in batch.sample_ids_B.tolist()]
    everyone = [sample for ids in run.runtime.ranks.gather(local) for sample in ids]
    run.saver.wait_briefly()  # which may be about to complete the last good checkpoint
    run.metrics.write("stopped", step=step, reason="not finite")  # NaN has no place in JSON, so no value
    return TrainingError(
        f"step {step}: the loss ({result.loss}) or the gradient norm ({result.grad_norm}) is not finite, and training "
        f"stopped before the update. Rows of this step: {run.name_rows(everyone)}. Last good checkpoint: "
        f"{run.saver.newest or 'none yet'}. Lower optimizer.lr, add lr_scheduler.lr_warmup_steps or look at these rows"
    )


def _out_of_memory(run: TrainingRun, step: int) -> TrainingError:
    run.saver.wait_briefly()
    run.metrics.write("stopped", step=step, reason="out of memory")
    return TrainingError(
        f"step {step}: memory ran out on {run.runtime.device}. Lower step_scheduler.local_batch_size (the result stays "
        "the same), set distributed.activation_checkpointing: true, or lower dataset.seq_length, then run again. Last "
        f"checkpoint: {run.saver.newest or 'none yet'}"
    )


def learning_rate(step: int, section: LRSchedulerConfig, peak: float, total_steps: int) -> float:
    """Return the learning rate of one step.

    Args:
        step: from 1 to `total_steps`.
        section: warm-up and decay.
        peak: the optimizer's lr.
        total_steps: the run's length.

    Returns:
        init_lr + (peak − init_lr)·step/warmup during warm-up, so that the first step already moves; then `peak`
        decaying to `min_lr`, which is reached after the last step.
    """
    warmup = section.warmup_steps(total_steps)
    if step <= warmup:
        return section.init_lr + (peak - section.init_lr) * step / warmup
    if section.lr_decay_style == "constant":
        return peak
    end = section.lr_decay_steps or total_steps
    progress = min(1.0, (step - 1 - warmup) / max(1, end - warmup))
    remaining = 1.0 - progress if section.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_lr + (peak - section.min_lr) * remaining


def due(step: int, every: int | None) -> bool:
    """Say whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


class StopRequest:
    """Context in which SIGINT and SIGTERM set `name` instead of killing the process; leaving restores the handlers."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def agreed(self, ranks: Ranks) -> str | None:
        """Return the signal that any rank has received, the same on all of them; a collective."""
        number = ranks.largest(0 if self.name is None else int(signal.Signals[self.name]))
        return None if number == 0 else signal.Signals(number).name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.name = signal.Signals(number).name
