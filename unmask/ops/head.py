"""The output head as one object: the linear map from hidden states to logits, and what follows it.

Shapes: D width, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """logits = c · tanh(z / c) of z = (scale · h) Wᵀ + b; z itself without a softcap (Gemma 2, arXiv 2408.00118, §2).

    Attributes:
        weight: (V, D); the embedding itself where tied.
        bias: (V,) or None.
        softcap: c; None = no cap.
        scale: factor of the hidden states.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def scaled(self, hidden: Tensor) -> Tensor:
        """Return scale · h, what the matrix is applied to."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D); softcapped ones are fp32 at least."""
        z = F.linear(self.scaled(hidden).to(self.weight.dtype), self.weight, self.bias)
        if self.softcap is None:
            return z
        return self.softcap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / self.softcap)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that matmuls of these hidden states run in: autocast's where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
