"""Validation loss on fixed noise: the same rows, levels and masks at every evaluation and in every run.

Noise levels are stratified over the validation rows, whatever the training uses, and the noise has a stream of its own,
so that two points of a curve differ by the model alone. Beside the mean stands the loss by noise level, since a model
learns other things, at other times, at low and at high levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.batch import Batch, Corrupted, TokenLosses
from unmask.distributed.ranks import ALONE, Ranks
from unmask.distributed.runtime import Runtime, free_gathered
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream

# Equal parts of the noise levels (0, 1] for which the loss is reported apart.
BUCKETS = 5


@dataclass(frozen=True)
class FixedBatch:
    """One corrupted batch of the validation rows.

    Attributes:
        noisy: the batch.
        counted: False for a batch that only keeps this rank in step with others that have one more.
    """

    noisy: Corrupted
    counted: bool


def fixed_noise(objective: Objective, batches: Sequence[Batch], seed: int, ranks: Ranks = ALONE) -> list[FixedBatch]:
    """Corrupt this rank's share of the validation rows once.

    Batches are dealt out in turn. Ranks that share a model run it together, so all get the same number of batches.

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
) -> dict[str, Any]:
    """Return the losses on all validation rows of all ranks, nats; the model's mode is restored.

    Returns:
        `loss` and `<term>_loss`, normalised as in training; `loss_by_noise_level`: for each of five equal parts of the
        noise levels, from the least noise to the most, the mean cross-entropy of a scored token (a masked one, or any
        of a canvas), not weighted; None where no token fell.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for part in batches:
        with runtime.autocast():
            terms = objective.token_losses(model, part.noisy.to(runtime.device))
        for name, term in terms.items():
            found = _sums(term) if part.counted else torch.zeros(2 + 2 * BUCKETS, dtype=torch.float64)
            sums[name] = sums[name] + found if name in sums else found
            weights[name] = term.weight
    model.train(was_training)
    if runtime.meshes is not None:
        free_gathered(model)
    names = sorted(sums)
    totals = torch.tensor(runtime.ranks.sum(torch.cat([sums[name] for name in names]).tolist()), dtype=torch.float64)
    by_term = dict(zip(names, totals.view(len(names), -1), strict=True))
    losses = {name: float(total[0] / total[1]) for name, total in by_term.items()}
    return {
        "loss": sum(weights[name] * value for name, value in losses.items()),
        **{f"{name}_loss": value for name, value in losses.items()},
        "loss_by_noise_level": _means(by_term),
    }


def _sums(term: TokenLosses) -> Tensor:
    """Return the weighted sum of a term and its count, then sum and count of plain cross-entropies in each bucket."""
    values_N, weights_N = term.cross_entropy_N.double(), term.weights_N.double()
    found = torch.zeros(2 + 2 * BUCKETS, dtype=torch.float64)
    found[0], found[1] = (values_N * weights_N).sum(), term.count
    if term.levels_N is not None:
        scored_N = (weights_N != 0).double()
        bucket_N = (term.levels_N * BUCKETS).long().clamp(0, BUCKETS - 1)
        found[2 : 2 + BUCKETS] = torch.bincount(bucket_N, values_N * scored_N, BUCKETS)
        found[2 + BUCKETS :] = torch.bincount(bucket_N, scored_N, BUCKETS)
    return found


def _means(by_term: Mapping[str, Tensor]) -> list[float | None]:
    """Return the mean of each bucket over the terms that have noise."""
    total = torch.stack(list(by_term.values())).sum(0)[2:].view(2, BUCKETS)
    return [float(value / count) if count else None for value, count in total.T]
