"""One draw from a categorical distribution by one uniform number, by inverting the cumulative distribution.

Gumbel noise takes a random number a token, which for 262,144 tokens and 256 positions is 67 million a step; this takes
one a position. A sum over so many weights in fp32 would misplace the boundaries between tokens, so it goes over blocks:
fp32 within a block, float64 across blocks, and float64 again inside the block that is hit.

Shapes: M positions, V weights, J blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512


def block_sums(weights_MV: Tensor) -> Tensor:
    """Return the sums of `BLOCK` neighbouring weights, (M, J) in the weights' dtype; the last block may be shorter."""
    whole = weights_MV.shape[1] // BLOCK * BLOCK
    sums_MJ = weights_MV[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)
    if whole == weights_MV.shape[1]:
        return sums_MJ
    return torch.cat((sums_MJ, weights_MV[:, whole:].sum(dim=-1, keepdim=True)), dim=1)


def categorical(weights_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """Return the first token whose cumulative weight exceeds u · total, int64 (M,). A weight of zero is never drawn.

    Args:
        weights_MV: (M, V), not negative, their sum positive; they need not add up to one.
        uniform_M: float64 (M,) in [0, 1).
    """
    upto_MJ = block_sums(weights_MV).double().cumsum(dim=-1)
    target_M1 = uniform_M[:, None] * upto_MJ[:, -1:]
    block_M1 = _first_above(upto_MJ, target_M1)
    before_M1 = F.pad(upto_MJ, (1, 0)).gather(1, block_M1)
    share_M1 = (target_M1 - before_M1) / (upto_MJ.gather(1, block_M1) - before_M1)
    columns_MK = block_M1 * BLOCK + torch.arange(BLOCK, device=weights_MV.device)
    inside_MK = columns_MK < weights_MV.shape[1]
    block_MK = weights_MV.gather(1, columns_MK.clamp(max=weights_MV.shape[1] - 1)).double() * inside_MK
    within_MK = block_MK.cumsum(dim=-1)
    # The block's sum in float64 differs from the one in fp32 by rounding, so the place inside goes by its share.
    token_M1 = block_M1 * BLOCK + _first_above(within_MK, share_M1 * within_MK[:, -1:])
    return token_M1[:, 0].clamp(max=weights_MV.shape[1] - 1)


def _first_above(rising_MJ: Tensor, target_M1: Tensor) -> Tensor:
    """Return the first place above the target, (M, 1); where rounding leaves none, the place of the last increase."""
    last_M1 = (rising_MJ < rising_MJ[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(rising_MJ, target_M1, right=True), last_M1)
