"""Which checkpoint is the best so far, by one measured number. Needs no torch.

The checkpoint of step N knows the best evaluation up to N (state.json), so that a resumed run goes on comparing with
it, and a killed one has lost nothing: the link `best` is put where the state says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LINK = "best"


@dataclass(frozen=True)
class Metric:
    """A number by which checkpoints are compared.

    Attributes:
        event: the kind of event that reports it in metrics.jsonl.
        field: its name there.
        larger: larger is better.
    """

    event: str
    field: str
    larger: bool


# checkpoint.best_metric → where it is reported; its keys are those of `unmask.config.results.METRICS`.
METRICS: dict[str, Metric] = {
    "validation_loss": Metric("validation", "loss", larger=False),
    "exact_match": Metric("exact_match", "exact_match", larger=True),
}


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        metric: a key of METRICS.
        value: the number.
        step: when it was measured; `step_N` is its checkpoint.
    """

    metric: str
    value: float
    step: int

    def to_state(self) -> dict[str, Any]:
        """Return it as state.json holds it."""
        return asdict(self)


def better(metric: str | None, best: Best | None, measured: Mapping[str, Mapping[str, Any]], step: int) -> Best | None:
    """Return this step's evaluation if it beats the best so far; None when it does not, or measured something else.

    Equal is not better. The model before the first step is no candidate: it has no checkpoint.

    Args:
        metric: a key of METRICS; None compares nothing.
        best: the best so far.
        measured: fields by the event that reports them.
        step: steps made.
    """
    if metric is None or step == 0:
        return None
    known = METRICS[metric]
    value = measured.get(known.event, {}).get(known.field)
    if value is None or not math.isfinite(value):
        return None
    if best is not None and (value <= best.value if known.larger else value >= best.value):
        return None
    return Best(metric, float(value), step)


def from_state(state: Mapping[str, Any], metric: str | None) -> Best | None:
    """Return the best evaluation that a checkpoint knows of; None when it compared by another metric, or by none."""
    found = state.get("best")
    return Best(**found) if found and found["metric"] == metric else None
