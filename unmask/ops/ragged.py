"""Rows of unlike length in one tensor, the shorter padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Return rows of token ids as int64 (rows, longest), padded with `value`."""
    longest = max(map(len, rows), default=0)
    padded = [[*row, *[value] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest)


def concat_padded(parts: Sequence[Tensor], value: float = 0, dim: int = 1) -> Tensor:
    """Return the rows of several tensors one behind the other, the shorter padded on the right along `dim`.

    Args:
        parts: alike but for their first dimension and `dim`.
        value: what padding holds.
        dim: not 0.
    """
    longest = max(part.shape[dim] for part in parts)
    behind = [0, 0] * (parts[0].dim() - dim - 1)  # F.pad counts dimensions from the last
    return torch.cat([F.pad(part, (*behind, 0, longest - part.shape[dim]), value=value) for part in parts])
