"""What is done with a tile of a large vocabulary, by the loss and by the self-conditioning signal alike.

A product is made in the compute dtype and kept in the one that sums need.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of the vocabulary worked on at a time. On a CPU a tile of logits stays in the cache through all that is done
# to it; elsewhere launches count, and this bounds what is cast from master weights to a narrower dtype.
TILE_ROWS = 2**12
DEVICE_TILE_ROWS = 2**16
DEVICE_TILE_LOGITS = 2**24
# Caps up to this leave exp(logit), and a vocabulary's sum of it, normal fp32 numbers: no maximum is needed.
SMALL_CAP = 40.0


def tile_rows(device: str, positions: int) -> int:
    """Return how many entries of the vocabulary a tile has.

    Args:
        device: `cpu` or another kind.
        positions: logits of each entry.
    """
    if device == "cpu":
        return TILE_ROWS
    return min(DEVICE_TILE_ROWS, max(TILE_ROWS, DEVICE_TILE_LOGITS // max(1, positions)))


def tiles(vocabulary: int, rows: int) -> Iterator[slice]:
    """Yield each tile of `rows` entries."""
    for start in range(0, vocabulary, rows):
        yield slice(start, min(start + rows, vocabulary))


def write_product(out: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """Write factor · left @ right to `out`, of any dtype, and return it."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)
    return torch.mul(torch.mm(left, right), factor, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, of any dtype, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
