"""One optimizer step: corrupt every micro-batch, count, run, divide once by the global count, clip, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.batch import Batch, LossTerms
from unmask.distributed.runtime import Runtime
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream
from unmask.training.optim import clip_gradients


@dataclass(frozen=True)
class StepResult:
    """What one step measured, on the host.

    Attributes:
        losses: value of each loss term, nats a counted unit.
        loss: their weighted total.
        grad_norm: global 2-norm before clipping.
        tokens: positions that the network saw.
        supervised_tokens: positions that the loss may look at.
        finite: False when the loss or the norm was not; the update was then not made.
    """

    losses: dict[str, float]
    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    finite: bool


def total_loss(terms: LossTerms, counts: dict[str, float]) -> Tensor:
    """Return Σ weight · sum / count over the terms, the count being that of the whole global batch."""
    return sum(term.weight * term.sum / counts[name] for name, term in terms.terms.items())  # pyright: ignore[reportReturnType]


def train_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    noise: NoiseStream,
    optimizer: Optimizer,
    runtime: Runtime,
    max_norm: float | None,
) -> StepResult:
    """Update the model once on the micro-batches of one global batch.

    Each loss term is a sum over all micro-batches divided once by the count of all, so that splitting the global batch
    otherwise changes nothing but rounding. A loss or gradient that is not finite leaves model and optimizer untouched.
    """
    import math

    import torch

    noisy = [objective.corrupt(batch, noise) for batch in batches]
    counts: dict[str, float] = {}
    for part in noisy:
        for name, count in part.counts.items():
            counts[name] = counts.get(name, 0.0) + count
    sums: dict[str, Any] = {}
    optimizer.zero_grad(set_to_none=True)
    for part in noisy:
        with runtime.autocast():
            terms = objective.loss(model, part.to(runtime.device))
        total_loss(terms, counts).backward()
        for name, term in terms.terms.items():
            sums[name] = sums.get(name, 0.0) + term.weight * term.sum.detach() / counts[name]
    norm = clip_gradients(optimizer, max_norm)
    # The one host synchronisation of a step: everything that is logged comes over together.
    *values, grad_norm = torch.stack([*(value.float() for value in sums.values()), norm]).tolist()
    finite = all(math.isfinite(value) for value in (*values, grad_norm))
    if finite:
        optimizer.step()
    return StepResult(
        losses=dict(zip(sums, values, strict=True)),
        loss=sum(values),
        grad_norm=grad_norm,
        tokens=sum(batch.input_ids_BL.numel() for batch in batches),
        supervised_tokens=int(sum(batch.answer_lengths_B.sum().item() for batch in batches)),
        finite=finite,
    )
