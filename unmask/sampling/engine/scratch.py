"""Memory that is written again by each chunk of logits: fresh memory costs a CPU a page fault every 4 KB."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """One buffer, grown as needed; what it gives is valid until it is asked again."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def rows(self, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor (rows, width) of undefined values on the device of `like`, in its dtype unless given."""
        dtype = like.dtype if dtype is None else dtype
        kept = self._kept
        if kept is None or kept.numel() < rows * width or kept.dtype != dtype or kept.device != like.device:
            kept = self._kept = torch.empty(rows * width, dtype=dtype, device=like.device)
        return kept[: rows * width].view(rows, width)
