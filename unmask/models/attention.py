"""Attention through SDPA, in the dtype in which this device's kernel is fast.

Shapes: B rows, H query heads, G key/value heads (H a multiple of G), L positions, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / √E) v, every position seeing all that the mask allows.

    SDPA picks the kernel: flash or memory-efficient on GPUs, flash on CPUs. The CPU's flash backward is some ten times
    slower in bf16 than in fp32 (torch 2.13, measured with AMX), so while gradients are wanted there it runs in fp32.

    Args:
        q_BHLE: queries.
        k_BGLE, v_BGLE: keys and values; each serves H / G query heads.
        mask: None or bool, broadcastable to (B, H, L, L), True = attend.

    Returns:
        (B, H, L, E) in the queries' dtype.
    """
    grouped = q_BHLE.shape[1] != k_BGLE.shape[1]
    if q_BHLE.device.type == "cpu" and q_BHLE.dtype == torch.bfloat16 and q_BHLE.requires_grad:
        with torch.autocast("cpu", enabled=False):
            wide = (heads.float() for heads in (q_BHLE, k_BGLE, v_BGLE))
            mixed_BHLE = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=grouped)
        return mixed_BHLE.to(q_BHLE.dtype)
    return F.scaled_dot_product_attention(q_BHLE, k_BGLE, v_BGLE, attn_mask=mask, enable_gqa=grouped)
