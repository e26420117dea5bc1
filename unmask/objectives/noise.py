"""Corruption levels and masks for absorbing diffusion, as pure functions of explicit uniform draws.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from torch import Tensor


def stratified_time(draws_B: Tensor, slots_B: Tensor, strata: int) -> Tensor:
    """Spread the times of a global batch evenly: row in slot i gets t ~ U(i/n, (i+1)/n).

    Each slot is a random place in the batch, so every row's t is still U(0, 1) and the loss keeps its expectation;
    its variance falls, since no batch can be all easy or all hard (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).

    Args:
        draws_B: U[0, 1), one a row.
        slots_B: int64, distinct within the global batch, 0..strata-1.
        strata: rows of the global batch.

    Returns:
        float32 (B,) in [0, 1]; 1 itself only by rounding, in the last slot.
    """
    return (slots_B.to(draws_B.dtype) + draws_B) / strata


def mask_probability(time_B: Tensor, eps: float) -> Tensor:
    """Return p = (1 − ε)·t + ε, the chance of each token to be masked (Nie et al. 2025, GUIDELINES.md).

    Args:
        time_B: t in [0, 1].
        eps: smallest probability, in (0, 1]; bounds the 1/p weight of the loss.
    """
    return (1 - eps) * time_B + eps


def absorb(
    input_ids_BL: Tensor, supervised_BL: Tensor, p_B: Tensor, draws_BL: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Replace each supervised token by the mask token, independently with its row's probability.

    Args:
        input_ids_BL: clean ids.
        supervised_BL: bool; other tokens are never touched.
        p_B: mask probability of each row.
        draws_BL: U[0, 1), one a position.
        mask_token_id: id of the mask token.

    Returns:
        (noisy ids, bool mask of the replaced positions), both (B, L).
    """
    masked_BL = (draws_BL < p_B[:, None]) & supervised_BL
    return input_ids_BL.masked_fill(masked_BL, mask_token_id), masked_BL
