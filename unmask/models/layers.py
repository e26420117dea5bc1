"""Layers that networks share: RMS norm, rotary position embedding and attention.

Shapes: B rows, L positions, D width, H query heads, G key/value heads (H a multiple of G), E head size; Q and K are L
as the positions that look and those that are looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from unmask.errors import ModelError
from unmask.ops.head import compute_dtype

Kernel = Literal["sdpa", "flex"]
Mask = Tensor | BlockMask | None


class LayerCache(Protocol):
    """One layer's keys and values of positions outside a forward pass."""

    def update(self, k_BGLE: Tensor, v_BGLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that the layer's queries attend to, (B, G, ·, E) each."""
        ...


class Cache(Protocol):
    """Keys and values of positions outside a forward pass, in all layers (`unmask/sampling/backends/window.py`)."""

    def layer(self, number: int) -> LayerCache:
        """Return a layer's, counted from 0."""
        ...


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

    def forward(self, hidden_BLD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the normalised hidden states in `dtype`; None = the wider one of the input's and the weight's.

        Give the dtype of products to what only they read, and the residual stream's to what is added to it: each is
        then cast once, or not at all.
        """
        weight_D = self.weight
        if weight_D is not None and weight_D.dtype != hidden_BLD.dtype:  # which no fused kernel takes
            hidden_BLD, weight_D = hidden_BLD.float(), weight_D.float()
        # On GPUs autocast would widen what is read here, and with it what is returned.
        with torch.autocast(hidden_BLD.device.type, enabled=False):
            normed_BLD = F.rms_norm(hidden_BLD, (self.size,), weight_D, self.eps)  # fp32 inside, rounded once
        return normed_BLD if dtype is None else normed_BLD.to(dtype)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles in fp32 (Su et al. 2021, eq. 34; half-split as in GPT-NeoX).

    Args:
        position_ids: (B, L) or (1, L), integers.
        head_dim: E, even.
        theta: base of the frequencies.
        pairs: how many of the E/2 pairs turn, the fastest first; the others stand still ("proportional" partial
            rotation, transformers `modeling_rope_utils.py`). None = all.

    Returns:
        two float32 tensors (B or 1, 1, L, E/2), broadcastable over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if pairs is not None:
        frequencies[pairs:] = 0.0
    return angle_tables(position_ids, frequencies)


def angle_tables(position_ids: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return `scale` times cos and sin of position · frequency, as `rotary_tables`; `frequencies` is fp32 (E/2,)."""
    angles = (position_ids.float()[..., None] * frequencies)[:, None]
    if scale == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * scale, angles.sin() * scale


def rotate(heads_BHLE: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Turn each pair (i, i + E/2) of queries or keys by its position's angle, in fp32; return `dtype`, None = as is."""
    return _Rotation.apply(heads_BHLE, cos, sin, 1, dtype or heads_BHLE.dtype)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    """A rotation by `turn` (1 or -1) times the angles; its gradient is the gradient turned back."""

    @staticmethod
    def forward(ctx: Any, heads_BHLE: Tensor, cos: Tensor, sin: Tensor, turn: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn, ctx.dtype = turn, heads_BHLE.dtype
        low, high = heads_BHLE.chunk(2, dim=-1)
        # Three kernels, which read any dtype as fp32.
        turned = heads_BHLE.unflatten(-1, (2, -1)) * cos.unsqueeze(-2)
        turned.select(-2, 0).addcmul_(high, sin, value=-turn)
        turned.select(-2, 1).addcmul_(low, sin, value=turn)
        return turned.flatten(-2).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return _Rotation.apply(gradients[0], *ctx.saved_tensors, -ctx.turn, ctx.dtype), None, None, None, None


def boolean_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Bring a network's `attention_mask` to bool and a shape that broadcasts to (B, H, Q, K).

    Args:
        attention_mask: None (everything attends to everything, which leaves SDPA its flash kernels), (B, K) for
            padding, or (B, 1, Q, K) for packing; bool or 0/1, 1 = attend.

    Raises:
        ModelError: another shape, or a 4-D mask of floats, which elsewhere means numbers added to the scores.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        raise ModelError("attention_mask of four dimensions must be bool or 0/1 integers (1 = attend), not floats")
    if attention_mask.dim() == 4:
        return attention_mask.bool()
    if attention_mask.dim() != 2:
        raise ModelError(f"attention_mask has shape {tuple(attention_mask.shape)}; give (B, L) or (B, 1, L, L)")
    keep_BK = attention_mask.bool()
    # A row of padding alone would have no key to attend to; such rows see themselves, and nothing looks at them.
    return (keep_BK | ~keep_BK.any(dim=1, keepdim=True))[:, None, None, :]


def prepare_mask(mask: Tensor | None, kernel: Kernel, rows: int, queries: int, keys: int) -> Mask:
    """Return what `attend` takes as mask, once for all layers of a forward pass.

    Args:
        mask: None or bool, broadcastable to (B, H, Q, K), True = attend.
        kernel: `flex` turns a mask (B, 1, 1 or Q, K) into a BlockMask, whose kernel skips blocks without an allowed
            pair; any other mask stays as it is, for SDPA.
        rows, queries, keys: B, Q and K.
    """
    if kernel == "sdpa" or mask is None or mask.shape[1] != 1:
        return mask
    keep_BQK = mask[:, 0].expand(rows, -1, keys).contiguous()
    by_key = keep_BQK.shape[1] == 1
    return create_block_mask(
        lambda b, h, q, k: keep_BQK[b, 0 if by_key else q, k], rows, None, queries, keys, device=mask.device
    )


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention compiled, which it must be to be fast; a failure to compile is raised by its first call."""
    return torch.compile(flex_attention)


def takes_groups(head_size: int, masked: bool, dtype: torch.dtype, device_type: str) -> bool:
    """Say whether SDPA surely has a fused kernel for keys and values of fewer heads than the queries.

    On CPUs its flash kernel takes all. On GPUs only flash does: 16 bits, no mask, a head size up to 256; the
    memory-efficient kernel never, cuDNN's on some devices. Where no fused kernel takes the call, SDPA computes all
    scores in fp32 and keeps them (PyTorch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    return device_type == "cpu" or (head_size <= 256 and not masked and dtype in (torch.bfloat16, torch.float16))


def attend(
    q_BHQE: Tensor,
    k_BGKE: Tensor,
    v_BGKE: Tensor,
    mask: Mask,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale · q kᵀ) v, (B, H, Q, E); each key/value head serves H / G query heads.

    SDPA picks the kernel: flash, cuDNN's or memory-efficient on GPUs, flash on CPUs. Heads that no fused kernel would
    share among queries are repeated for it.

    Args:
        q_BHQE, k_BGKE, v_BGKE: queries, keys and values.
        mask: from `prepare_mask`; a BlockMask goes through FlexAttention.
        causal: position i sees positions 0..i; only without a mask.
        scale: factor of the scores; None = 1/√E.
    """
    grouped = q_BHQE.shape[1] != k_BGKE.shape[1]
    if isinstance(mask, BlockMask):
        return compiled_flex()(q_BHQE, k_BGKE, v_BGKE, block_mask=mask, scale=scale, enable_gqa=grouped)
    if grouped and not takes_groups(q_BHQE.shape[3], mask is not None, compute_dtype(q_BHQE), q_BHQE.device.type):
        times, grouped = q_BHQE.shape[1] // k_BGKE.shape[1], False
        k_BGKE, v_BGKE = k_BGKE.repeat_interleave(times, dim=1), v_BGKE.repeat_interleave(times, dim=1)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": scale}
    if grouped:  # said as a constant: what is compiled may hold sizes, and what follows from them, as symbols
        options["enable_gqa"] = True
    if q_BHQE.device.type == "cpu" and q_BHQE.dtype == torch.bfloat16 and q_BHQE.requires_grad:
        # The backward pass of the CPU's flash kernel is some ten times slower in bf16 than in fp32 (torch 2.13, AMX).
        with torch.autocast("cpu", enabled=False):
            wide = (q_BHQE.float(), k_BGKE.float(), v_BGKE.float())
            return F.scaled_dot_product_attention(*wide, **options).to(q_BHQE.dtype)
    return F.scaled_dot_product_attention(q_BHQE, k_BGKE, v_BGKE, **options)
