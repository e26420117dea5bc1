"""Validation loss on noise that never changes: the same rows, levels and masks at every evaluation and in every run.

Corruption levels are stratified over the validation rows, whatever the training uses, and the noise is in a scope of
its own, so that two points of a curve differ by the model alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unmask.batch import Batch, Corrupted
from unmask.distributed.ranks import ALONE, Ranks
from unmask.distributed.runtime import Runtime
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream


@dataclass(frozen=True)
class FixedBatch:
    """One corrupted batch of the validation rows.

    Attributes:
        noisy: the batch.
        counted: False for a batch that only keeps this rank in step with the others, who have one more.
    """

    noisy: Corrupted
    counted: bool


def fixed_noise(objective: Objective, batches: Sequence[Batch], seed: int, ranks: Ranks = ALONE) -> list[FixedBatch]:
    """Corrupt this rank's share of the validation rows once and for all.

    The batches are dealt out in turn. Ranks that share a model run it together, so all get the same number of batches.

    Args:
        objective: one that stratifies its levels over `Batch.global_rows`.
        batches: all validation rows; slots number them all.
        seed: the run's seed; the scope differs from training's.
        ranks: among whom the batches are dealt out.
    """
    stream = NoiseStream(seed, scope="validation")
    own = []
    for first in range(0, len(batches), ranks.size):
        together = batches[first : first + ranks.size]
        mine = together[min(ranks.rank, len(together) - 1)]
        peers_P = torch.cat([batch.peers_P for batch in together])
        noisy = objective.corrupt(dataclasses.replace(mine, peers_P=peers_P), stream)
        own.append(FixedBatch(noisy, ranks.rank < len(together)))
    return own


@torch.no_grad()
def validation_losses(
    model: nn.Module, objective: Objective, batches: Sequence[FixedBatch], runtime: Runtime
) -> dict[str, float]:
    """Return `loss` and `<term>_loss` over all validation rows of all ranks, nats; the model's mode is restored."""
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in batches:
        with runtime.autocast():
            terms = objective.loss(model, part.noisy.to(runtime.device))
        for name, term in terms.terms.items():
            sums[name] = sums.get(name, 0.0) + (float(term.sum) if part.counted else 0.0)
            counts[name] = counts.get(name, 0.0) + (term.count if part.counted else 0.0)
            weights[name] = term.weight
    model.train(was_training)
    if runtime.meshes is not None:
        from unmask.distributed.shard import free_gathered

        free_gathered(model)
    names = sorted(sums)
    totals = runtime.ranks.sum([*(sums[name] for name in names), *(counts[name] for name in names)])
    losses = {name: totals[i] / totals[len(names) + i] for i, name in enumerate(names)}
    return {"loss": sum(weights[n] * v for n, v in losses.items()), **{f"{n}_loss": v for n, v in losses.items()}}
