"""The loss of an objective's terms: all go through the head in one call of `linear_cross_entropy`.

One call needs one gradient buffer as large as the head's matrix; a call a term would need one each. Gradients are
computed in the forward pass, so the count that divides a term must be known there.

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


class ScoredTerm(NamedTuple):
    """One term of a loss: the hidden states, targets and weights that its cross-entropy is computed from.

    Attributes:
        hidden_ND: final hidden states.
        targets_N: int64, the clean tokens.
        weights_N, levels_N, weight: as in `TokenLosses`.
    """

    hidden_ND: Tensor
    targets_N: Tensor
    weights_N: Tensor
    levels_N: Tensor | None
    weight: float = 1.0


def loss_terms(
    model: Any,
    scored: Mapping[str, ScoredTerm],
    local_counts: Mapping[str, float],
    global_counts: Mapping[str, float] | None,
) -> LossTerms:
    """Return Σ weight · (Σ w · CE) / count over the terms, and each term's own sum.

    Args:
        local_counts: each term's count in this micro-batch.
        global_counts: each term's count in the global batch, its divisor; None = `local_counts`.
    """
    divisors = local_counts if global_counts is None else global_counts
    hidden_ND = _concat([term.hidden_ND for term in scored.values()])
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    weights = [term.weights_N.to(wide) for term in scored.values()]
    # A zero count makes the loss nan, so that the step is refused.
    factors = [term.weight / divisors[name] if divisors[name] else math.nan for name, term in scored.items()]
    shares_N = _concat([weights_n * factor for weights_n, factor in zip(weights, factors, strict=True)])
    targets_N = _concat([term.targets_N for term in scored.values()])
    total, losses_N = linear_cross_entropy(hidden_ND, model.head, targets_N, shares_N)
    sums = (losses_N * _concat(weights)).split([len(weights_n) for weights_n in weights])
    terms = {
        name: LossTerm(part_n.sum(), local_counts[name], term.weight)
        for (name, term), part_n in zip(scored.items(), sums, strict=True)
    }
    return LossTerms(total, terms)


def token_losses(
    model: Any, scored: Mapping[str, ScoredTerm], local_counts: Mapping[str, float]
) -> dict[str, TokenLosses]:
    """Return the terms position by position; arguments as in `loss_terms`."""
    return {
        name: TokenLosses(
            cross_entropies(term.hidden_ND, model.head, term.targets_N),
            term.weights_N, term.levels_N, local_counts[name], term.weight,
        )
        for name, term in scored.items()
    }  # fmt: skip


def _concat(parts: list[Tensor]) -> Tensor:
    """Concatenate; a single tensor is returned as it is, not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
