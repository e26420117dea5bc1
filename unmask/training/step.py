"""One step of the optimizer: corrupt every micro-batch, run each with the counts of all, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from unmask.batch import Batch, Corrupted, Work
from unmask.distributed.runtime import Runtime, synchronise_gradients
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream
from unmask.training.optim import clip_gradients, squared_norm

# Parts of a step, by the names that they have in a profile.
DATA, CORRUPT, FORWARD, BACKWARD, UPDATE = "data", "corrupt", "forward and loss", "backward", "clip and update"
EXCHANGE = "exchange of counts"


@dataclass(frozen=True)
class StepResult:
    """What one step measured over all ranks, on the host.

    Attributes:
        losses: value of each loss term, nats a counted unit, not weighted.
        loss: their weighted total.
        grad_norm: global 2-norm before clipping.
        tokens: positions that the network saw.
        supervised_tokens: positions that the loss may look at.
        finite: False when the loss or the norm was not; the update was then not made.
        flops: operations of the matrix products (`flops.py`).
    """

    losses: dict[str, float]
    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    finite: bool
    flops: float


def train_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    noise: NoiseStream,
    optimizer: Optimizer,
    runtime: Runtime,
    max_norm: float | None,
    defer_grad_sync: bool = True,
    count_flops: Callable[[Work], float] = lambda work: 0.0,
) -> StepResult:
    """Update the model once on the micro-batches of one global batch, of which this rank has its own.

    Each loss term is a sum over all micro-batches and ranks divided once by the count of all, so that dividing the
    global batch otherwise changes nothing but rounding. A loss or gradient that is not finite leaves model and
    optimizer untouched, on every rank.

    Args:
        model, optimizer: shards of them where there are several ranks.
        batches: this rank's micro-batches.
        max_norm: gradients are scaled down to this global 2-norm; None = never.
        defer_grad_sync: with several ranks, sum gradients over them after the last micro-batch alone.
        count_flops: counts the operations of a micro-batch.
    """
    with record_function(CORRUPT):
        noisy = [objective.corrupt(batch, noise) for batch in batches]
    flops = sum(count_flops(objective.work(part)) for part in noisy)
    counts, (tokens, supervised, flops) = _global_counts(noisy, batches, flops, runtime)
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for number, part in enumerate(noisy, start=1):
        if runtime.meshes is not None:
            synchronise_gradients(model, not defer_grad_sync or number == len(noisy))
        with record_function(FORWARD), runtime.autocast():
            loss = objective.loss(model, part.to(runtime.device), counts)
        with record_function(BACKWARD):
            loss.total.backward()
        for name, term in loss.terms.items():
            sums[name] = sums.get(name, 0.0) + term.sum.float() / counts[name]
            weights[name] = term.weight
    if runtime.meshes is None:
        norm = clip_gradients(optimizer, max_norm)
        measured = torch.stack([*sums.values(), norm])
    else:
        # One collective: the terms' sums and every rank's share of the squared norm.
        share = squared_norm(optimizer, runtime.meshes.degrees.replicate).to(runtime.device)
        measured = runtime.ranks.sum_tensor(torch.stack([*sums.values(), share]))
        measured[-1] = clip_gradients(optimizer, max_norm, measured[-1].sqrt())
    # The one host synchronisation of a step: everything that is logged comes over together.
    *values, grad_norm = measured.tolist()
    finite = all(math.isfinite(value) for value in (*values, grad_norm))
    if finite:
        with record_function(UPDATE):
            optimizer.step()
    losses = dict(zip(sums, values, strict=True))
    return StepResult(
        losses=losses,
        loss=sum(weights[name] * value for name, value in losses.items()),
        grad_norm=grad_norm,
        tokens=int(tokens),
        supervised_tokens=int(supervised),
        finite=finite,
        flops=flops,
    )


def _global_counts(
    noisy: Sequence[Corrupted], batches: Sequence[Batch], flops: float, runtime: Runtime
) -> tuple[dict[str, float], list[float]]:
    """Return each term's count, and the positions seen, those supervised and the operations, over all ranks."""
    names = sorted(noisy[0].counts)
    counts = [sum(part.counts[name] for part in noisy) for name in names]
    tokens = sum(batch.input_ids_BL.numel() for batch in batches)
    supervised = sum(batch.answer_lengths_B.sum().item() for batch in batches)
    with record_function(EXCHANGE):
        sums = runtime.ranks.sum([*counts, tokens, supervised, flops])
    return dict(zip(names, sums, strict=False)), sums[len(names) :]
