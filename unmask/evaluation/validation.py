"""Validation loss on noise that never changes: the same rows, levels and masks at every evaluation and in every run.

Corruption levels are stratified over the validation rows, whatever the training uses, and the noise is in a scope of
its own, so that two points of a curve differ by the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unmask.batch import Batch, NoisyBatch
from unmask.distributed.runtime import Runtime
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream


def fixed_noise(objective: Objective, batches: Sequence[Batch], seed: int) -> list[NoisyBatch]:
    """Corrupt the validation rows once and for all.

    Args:
        objective: one that stratifies its levels over `Batch.global_rows`.
        batches: the validation rows; slots number them all.
        seed: the run's seed; the scope differs from training's.
    """
    stream = NoiseStream(seed, scope="validation")
    return [objective.corrupt(batch, stream) for batch in batches]


@torch.no_grad()
def validation_losses(
    model: nn.Module, objective: Objective, noisy: Sequence[NoisyBatch], runtime: Runtime
) -> dict[str, float]:
    """Return `loss` and `<term>_loss` over all validation rows, nats; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in noisy:
        with runtime.autocast():
            terms = objective.loss(model, part.to(runtime.device))
        for name, term in terms.terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.sum)
            counts[name] = counts.get(name, 0.0) + term.count
            weights[name] = term.weight
    model.train(was_training)
    losses = {name: sums[name] / counts[name] for name in sums}
    return {"loss": sum(weights[n] * v for n, v in losses.items()), **{f"{n}_loss": v for n, v in losses.items()}}
