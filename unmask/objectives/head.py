"""From what an objective scores to its loss: all terms go through the head in one call of `linear_cross_entropy`.

One call has one buffer for the gradient of the head's matrix, which is as large as the matrix; a call for each term
would have one each. It makes gradients in the forward pass, so what divides a term must be known there.

Shapes: N scored positions of all terms, n of one, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.batch import LossTerm, LossTerms, TokenLosses
from unmask.ops.linear_cross_entropy import cross_entropies, linear_cross_entropy


class Scored(NamedTuple):
    """What one term of a loss scores.

    Attributes:
        hidden_ND: final hidden states.
        targets_N: int64, the clean tokens.
        weights_N: float, of each position's cross-entropy; 0 = not scored.
        levels_N: float32, the noise level at each position, in (0, 1]; None for a term without noise.
        weight: factor of the term in the total loss.
    """

    hidden_ND: Tensor
    targets_N: Tensor
    weights_N: Tensor
    levels_N: Tensor | None
    weight: float = 1.0


def loss_terms(
    model: Any,
    scored: Mapping[str, Scored],
    local: Mapping[str, float],
    counts: Mapping[str, float] | None,
) -> LossTerms:
    """Return Σ weight · (Σ w · CE) / count over the terms, and each term's own sum.

    Args:
        model: has the head.
        scored: the terms by name.
        local: each term's count in this micro-batch.
        counts: each term's count in the global batch, which divides it; None = `local`.
    """
    divisors = local if counts is None else counts
    hidden_ND = _concat([term.hidden_ND for term in scored.values()])
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    weights = [term.weights_N.to(wide) for term in scored.values()]
    # A count of zero is no division to hide: the loss is then not a number, and the step is refused.
    factors = [term.weight / divisors[name] if divisors[name] else math.nan for name, term in scored.items()]
    shares_N = _concat([weights_n * factor for weights_n, factor in zip(weights, factors, strict=True)])
    targets_N = _concat([term.targets_N for term in scored.values()])
    total, losses_N = linear_cross_entropy(hidden_ND, model.head, targets_N, shares_N)
    sums = (losses_N * _concat(weights)).split([len(weights_n) for weights_n in weights])
    terms = {
        name: LossTerm(part_n.sum(), local[name], term.weight)
        for (name, term), part_n in zip(scored.items(), sums, strict=True)
    }
    return LossTerms(total, terms)


def token_losses(model: Any, scored: Mapping[str, Scored], local: Mapping[str, float]) -> dict[str, TokenLosses]:
    """Return the terms position by position; arguments as in `loss_terms`."""
    return {
        name: TokenLosses(
            cross_entropies(term.hidden_ND, model.head, term.targets_N),
            term.weights_N, term.levels_N, local[name], term.weight,
        )
        for name, term in scored.items()
    }  # fmt: skip


def _concat(parts: list[Tensor]) -> Tensor:
    """Return the tensors one after another; one alone as it is, not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
