"""Attention through SDPA, in the dtype in which this device's kernel is fast, or through FlexAttention where asked for.

Shapes: B rows, H query heads, G key/value heads (H a multiple of G), L positions, E head size; Q and K are L as the
position that looks and the one that is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.key_runs import KeyRun

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    # What is attended to: all, what a bool tensor allows, what FlexAttention's mask does, or each run of rows its keys.
    Mask = Tensor | BlockMask | tuple[KeyRun, ...] | None

Kernel = Literal["sdpa", "flex"]


def flex_available(device: torch.device) -> bool:
    """Say whether FlexAttention trains on this device: CUDA of compute capability 8.0 (Ampere) or later, with Triton.

    Its kernels are compiled; elsewhere PyTorch has a slow reference or no backward pass (Dong et al. 2024,
    arXiv 2412.05496; torch.nn.attention.flex_attention).
    """
    from importlib.util import find_spec

    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    return (
        find_spec("torch.nn.attention.flex_attention") is not None and torch.cuda.get_device_capability(device)[0] >= 8
    )


def prepare_mask(
    mask: Tensor | None, kernel: Kernel, rows: int, length: int, keys: int | None = None
) -> Tensor | BlockMask | None:
    """Return what `attend` wants as mask, once for all layers of a forward pass.

    Args:
        mask: None or bool, broadcastable to (B, H, Q, K), True = attend.
        kernel: `flex` turns a mask (B, 1, 1, K) of keys or (B, 1, Q, K) of pairs into a BlockMask, which lets the
            kernel skip blocks without an allowed pair; any other mask stays as it is, for SDPA.
        rows, length: B and Q.
        keys: K; None = Q.
    """
    keys = length if keys is None else keys
    if kernel == "sdpa" or mask is None or mask.shape[1] != 1:
        return mask
    from torch.nn.attention.flex_attention import create_block_mask

    if mask.shape[2] == 1:
        keep_BK = mask[:, 0, 0].expand(rows, keys).contiguous()
        return create_block_mask(lambda b, h, q, k: keep_BK[b, k], rows, None, length, keys, device=mask.device)
    keep_BQK = mask[:, 0].expand(rows, length, keys).contiguous()
    return create_block_mask(lambda b, h, q, k: keep_BQK[b, q, k], rows, None, length, keys, device=mask.device)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention compiled, which it must be to be fast; a failure to compile is raised by its first call."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(
    q_BHLE: Tensor,
    k_BGLE: Tensor,
    v_BGLE: Tensor,
    mask: Mask,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale · q kᵀ) v, every position seeing all that the mask allows.

    SDPA picks the kernel: flash or memory-efficient on GPUs, flash on CPUs. The CPU's flash backward is some ten times
    slower in bf16 than in fp32 (torch 2.13, measured with AMX), so while gradients are wanted there it runs in fp32.

    Args:
        q_BHLE: queries.
        k_BGLE, v_BGLE: keys and values; each serves H / G query heads; there may be more of them than queries.
        mask: from `prepare_mask`, where a BlockMask goes through FlexAttention; or runs of rows, which are computed one
            after the other.
        causal: position i sees positions 0..i; only without a mask, which must say so itself.
        scale: factor of the scores; None = 1/√E.

    Returns:
        (B, H, L, E) in the queries' dtype.
    """
    if isinstance(mask, tuple):
        parts = (
            attend(
                q_BHLE[run.rows],
                k_BGLE[run.rows, :, : run.keys],
                v_BGLE[run.rows, :, : run.keys],
                run.mask,
                scale=scale,
            )
            for run in mask
        )
        return torch.cat(tuple(parts))
    grouped = q_BHLE.shape[1] != k_BGLE.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        return compiled_flex()(q_BHLE, k_BGLE, v_BGLE, block_mask=mask, scale=scale, enable_gqa=grouped)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": grouped}
    if q_BHLE.device.type == "cpu" and q_BHLE.dtype == torch.bfloat16 and q_BHLE.requires_grad:
        with torch.autocast("cpu", enabled=False):
            q_wide, k_wide, v_wide = q_BHLE.float(), k_BGLE.float(), v_BGLE.float()
            return F.scaled_dot_product_attention(q_wide, k_wide, v_wide, **options).to(q_BHLE.dtype)
    return F.scaled_dot_product_attention(q_BHLE, k_BGLE, v_BGLE, **options)
