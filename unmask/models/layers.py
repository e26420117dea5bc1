"""Small layers that several families share: RMS norm and rotary positions, both computed in fp32.

Their backward passes are written out where that takes fewer passes over memory than autograd's, which goes through
each elementwise operation by itself: beside small matmuls those passes are most of a training step on a CPU.

Shapes: B rows, L positions, D width, H heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unmask.products import linear


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
        own = hidden_BLD.device.type == "cpu" and hidden_BLD.dtype != torch.float64
        if own and self.weight is not None and not torch.compiler.is_compiling():
            normed_BLD = _ScaledRMSNorm.apply(hidden_BLD.float(), self.weight.float(), self.eps)
            return normed_BLD.to(hidden_BLD.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        if self.weight is None or self.weight.dtype == hidden_BLD.dtype:
            # Computed in fp32 inside and rounded once, in one kernel where the device has it.
            return F.rms_norm(hidden_BLD, (self.size,), self.weight, self.eps).to(hidden_BLD.dtype)
        return F.rms_norm(hidden_BLD.float(), (self.size,), self.weight.float(), self.eps).to(hidden_BLD.dtype)


class _ScaledRMSNorm(torch.autograd.Function):
    """RMS norm with a weight, fp32 in and out. PyTorch has no kernel for it on CPUs, but a formula of ten operations.

    With n = x / rms(x) and g the incoming gradient: the weight's is Σ g · n, and x's is (g · w − n · mean(g · w · n)) /
    rms(x).
    """

    @staticmethod
    def forward(ctx: Any, hidden_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return x / rms(x) · w."""
        inverse_BL1 = hidden_BLD.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_BLD, weight_D, inverse_BL1)
        return (hidden_BLD * inverse_BL1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of the input and of the weight."""
        hidden_BLD, weight_D, inverse_BL1 = ctx.saved_tensors
        normed_BLD = hidden_BLD * inverse_BL1
        product_BLD = grad_BLD * normed_BLD
        weight_grad_D = product_BLD.reshape(-1, len(weight_D)).sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad_D, None
        with torch.autocast(grad_BLD.device.type, enabled=False):  # which may be on where backward is called
            mean_BL1 = (product_BLD @ weight_D)[..., None].div_(-len(weight_D))
        hidden_grad_BLD = torch.mul(grad_BLD, weight_D, out=product_BLD)
        return hidden_grad_BLD.addcmul_(normed_BLD, mean_BL1).mul_(inverse_BL1), weight_grad_D, None


class Linear(nn.Linear):
    """PyTorch's layer, with the product by the library that this CPU is fast with."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of (..., I), (..., O)."""
        return linear(input, self.weight, self.bias)


def embedding(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """Return a new embedding; on the meta device, where there is nothing to draw, without drawing.

    There a draw makes PyTorch import its compiler, and every command would take a second or two longer to start.
    """
    if torch.get_default_device().type != "meta":
        return nn.Embedding(rows, width, padding_idx)
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False, padding_idx=padding_idx)


def for_matmuls(hidden: Tensor) -> Tensor:
    """Return what several linear layers read, once in the dtype that autocast would cast it to for each of them.

    Their gradients are then summed in that dtype, too, as where the weights have it.
    """
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


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
    """Turn each pair (i, i + E/2) by its position's angle; computed in fp32, returned in the input's dtype.

    Args:
        heads_BHLE: queries or keys.
        cos, sin: from `rotary_tables`; nothing is differentiated with respect to them.
    """
    return _Rotation.apply(heads_BHLE, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is turned back by the same angles; nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, heads_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the turned heads."""
        ctx.save_for_backward(cos, sin)
        return _turn(heads_BHLE, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHLE: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient turned back."""
        cos, sin = ctx.saved_tensors
        return _turn(grad_BHLE, cos, -sin), None, None


def _turn(heads_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = heads_BHLE.float()
    low, high = wide.chunk(2, dim=-1)
    low_sin, high_sin = sin.chunk(2, dim=-1)
    turned = wide * cos
    turned_low, turned_high = turned.chunk(2, dim=-1)
    turned_low.addcmul_(high, low_sin, value=-1)
    turned_high.addcmul_(low, high_sin)
    return turned.to(heads_BHLE.dtype)
