"""Rows of unequal length as one tensor, padded on the right. Shapes: B rows, L columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(rows: Sequence[Any], fill: int | bool = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return rows of numbers as a CPU tensor (B, L), and bool (B, L), True where a row has a value.

    Args:
        rows: lists or arrays; none longer than `width`.
        fill: the padding; its type, int or bool, gives the tensor's: int64 or bool.
        width: L; None = the longest row's length.
    """
    shape = len(rows), max(map(len, rows), default=0) if width is None else width
    values_BL, present_BL = torch.full(shape, fill), torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        values_BL[index, : len(row)] = torch.as_tensor(row)
        present_BL[index, : len(row)] = True
    return values_BL, present_BL


def concat_padded(parts: Sequence[Tensor], value: float = 0, dim: int = 1) -> Tensor:
    """Return the rows of several tensors one behind the other, the shorter padded with `value` along `dim`, not 0."""
    longest = max(part.shape[dim] for part in parts)
    behind = [0, 0] * (parts[0].dim() - dim - 1)  # F.pad counts dimensions from the last
    return torch.cat([F.pad(part, (*behind, 0, longest - part.shape[dim]), value=value) for part in parts])
