"""What is measured during a run, when, and whether it was the best so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from unmask.training.best import Best, better
from unmask.training.schedule import due

if TYPE_CHECKING:
    from unmask.training.loop import TrainingRun


@dataclass(frozen=True)
class Validator:
    """One kind of measurement.

    Attributes:
        event: the kind of event that it is recorded as.
        every: how often, in steps; None = at the end of the run only.
        measure: takes the network and the steps made, returns the event's fields; the same on every rank.
    """

    event: str
    every: int | None
    measure: Callable[[nn.Module, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What the measurements of one step came to.

    Attributes:
        good: the run may end here.
        best: the best evaluation up to this step.
        is_best: it is this one.
    """

    good: bool
    best: Best | None
    is_best: bool


def due_after(validators: Sequence[Validator], step: int) -> list[Validator]:
    """Return the measurements that are made after a step."""
    return [validator for validator in validators if due(step, validator.every)]


def evaluate(run: TrainingRun, step: int, validators: Sequence[Validator], best: Best | None) -> Evaluation:
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
    found = better(run.checkpoint.best_metric, best, measured, step)
    if found is not None:
        run.metrics.write("best", step=step, metric=found.metric, value=found.value)
        run.progress.say(f"step {step}  best {found.metric} so far")
    together = {name: value for fields in measured.values() for name, value in fields.items()}
    return Evaluation(bool(measured) and run.is_good_enough(together), found or best, found is not None)
