"""softmax(logits) @ embedding, some columns of the vocabulary at a time: logits and softmax never exist whole.

Shapes: N positions, D width, V vocabulary rows, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.ops.chunks import CACHED_LOGITS, CAST_ROWS, column_slices, sum_dtype, write_product
from unmask.ops.head import Head, compute_dtype


def soft_embedding(hidden_ND: Tensor, head: Head) -> Tensor:
    """Return softmax(head.logits(h)) @ head.weight, (N, D) in the weight's dtype.

    The logits are constants: a gradient reaches the weight as what is mixed, but neither it nor h through the logits.

    Args:
        hidden_ND: final hidden states.
        head: without bias; its matrix is the embedding.
    """
    assert head.bias is None
    scaled_ND = head.scaled(hidden_ND.detach()).to(compute_dtype(head.weight))
    return _SoftEmbedding.apply(scaled_ND, head.weight, head.softcap)  # pyright: ignore[reportReturnType]


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, softcap):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the mix; sums follow the highest logit so far (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
        products = sum_dtype(hidden_ND.dtype)
        mixed_ND = torch.zeros_like(hidden_ND, dtype=torch.promote_types(products, torch.float32))
        total_N1 = torch.zeros_like(mixed_ND[:, :1])
        highest_N1 = torch.full_like(total_N1, -torch.inf)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for columns, logits_NC in _logits(hidden_ND, weight_VD, softcap):
                before_N1 = highest_N1
                highest_N1 = torch.maximum(before_N1, logits_NC.amax(dim=1, keepdim=True))
                lower_N1 = (before_N1 - highest_N1).exp_()
                shares_NC = logits_NC.sub_(highest_N1).exp_()
                total_N1.mul_(lower_N1).add_(shares_NC.sum(dim=1, keepdim=True))
                mixed_ND *= lower_N1
                write_product(mixed_ND, shares_NC.to(products), weight_VD[columns].to(products), add=True)
        ctx.save_for_backward(hidden_ND, weight_VD, highest_N1 + total_N1.log())
        ctx.softcap = softcap
        return (mixed_ND / total_N1).to(weight_VD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, logsum_N1 = ctx.saved_tensors
        products, grad_VD = sum_dtype(hidden_ND.dtype), torch.empty_like(weight_VD)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # which may be on where backward is called
            for columns, logits_NC in _logits(hidden_ND, weight_VD, ctx.softcap):
                shares_NC = logits_NC.sub_(logsum_N1).exp_()
                write_product(grad_VD[columns], shares_NC.to(products).t(), grad_ND.to(products))
        return None, grad_VD, None


def _logits(hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield some columns at a time and their logits (N, C), fp32 at least; on a CPU as many as stay in its cache."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    cached = max(CAST_ROWS // 16, CACHED_LOGITS // max(1, len(hidden_ND)))
    for columns in column_slices(len(weight_VD), cached if hidden_ND.device.type == "cpu" else CAST_ROWS):
        z_NC = (hidden_ND @ weight_VD[columns].to(hidden_ND.dtype).t()).to(wide)
        yield columns, z_NC if softcap is None else z_NC.div_(softcap).tanh_().mul_(softcap)
