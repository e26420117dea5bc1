"""Small layers that several families share: RMS norm and rotary positions, both computed in fp32.

Shapes: B rows, L positions, D width, H heads, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Args:
        size: D.
        eps: added to the mean square.
        scale: False leaves the weight out.
    """

    weight: nn.Parameter | None

    def __init__(self, size: int, eps: float, scale: bool = True) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if scale else None

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Return the normalised hidden states in the input's dtype."""
        if self.weight is None or self.weight.dtype == hidden_BLD.dtype:
            # Computed in fp32 inside and rounded once, in one kernel where the device has it.
            return F.rms_norm(hidden_BLD, (self.size,), self.weight, self.eps).to(hidden_BLD.dtype)
        return F.rms_norm(hidden_BLD.float(), (self.size,), self.weight.float(), self.eps).to(hidden_BLD.dtype)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles in fp32 (Su et al. 2021, eq. 34; half-split as in GPT-NeoX).

    Args:
        position_ids: (B, L) or (1, L), integers.
        head_dim: E, even.
        theta: base of the frequencies.
        pairs: how many of the E/2 pairs turn, the fastest first; the others stand still ("proportional" partial
            rotation, transformers `modeling_rope_utils.py`). None = all.

    Returns:
        two float32 tensors (B or 1, 1, L, E), broadcastable over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if pairs is not None:
        frequencies[pairs:] = 0.0
    angles = position_ids.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(heads_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) by its position's angle; computed in fp32, returned in the input's dtype."""
    x = heads_BHLE.float()
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(heads_BHLE.dtype)
