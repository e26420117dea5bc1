"""softmax(logits) @ embedding, a chunk of rows at a time: logits and softmax of all rows never exist.

Shapes: N positions, R rows of a chunk, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.ops.chunks import (
    CHUNK_LOGITS,
    cached_rows,
    column_slices,
    compute_dtype,
    logit_chunks,
    sum_dtype,
    write_product,
)
from unmask.ops.head import Head


def soft_embedding(hidden_ND: Tensor, head: Head, chunk_logits: int = CHUNK_LOGITS) -> Tensor:
    """Return softmax(head.logits(h)) @ head.weight, (N, D) in the weight's dtype.

    The logits are constants: a gradient reaches the weight as what is mixed, but neither it nor h through the logits.

    Args:
        hidden_ND: final hidden states.
        head: without bias; its matrix is the embedding.
        chunk_logits: most logits alive at once, but one row at least.
    """
    assert head.bias is None
    scaled_ND = head.scaled(hidden_ND.detach())
    scaled_ND = scaled_ND.to(compute_dtype(head.weight))
    return _SoftEmbedding.apply(scaled_ND, head.weight, head.softcap, chunk_logits)  # pyright: ignore[reportReturnType]


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, softcap, chunk_logits):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.softcap, ctx.chunk_logits = softcap, chunk_logits
        dtype = sum_dtype(hidden_ND.dtype)
        mixed_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=torch.promote_types(dtype, torch.float32))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part, shares_RV in _softmax_chunks(hidden_ND, weight_VD, softcap, chunk_logits):
                for columns in column_slices(len(weight_VD)):
                    shares_RC, part_CD = shares_RV[:, columns].to(dtype), weight_VD[columns].to(dtype)
                    write_product(mixed_ND[part], shares_RC, part_CD, add=columns.start > 0)
        return mixed_ND.to(weight_VD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD = ctx.saved_tensors
        dtype = sum_dtype(hidden_ND.dtype)
        grad_VD = weight_VD.new_empty(weight_VD.shape, dtype=torch.promote_types(dtype, torch.float32))
        with torch.autocast(hidden_ND.device.type, enabled=False):  # which may be on where backward is called
            for part, shares_RV in _softmax_chunks(hidden_ND, weight_VD, ctx.softcap, ctx.chunk_logits):
                for columns in column_slices(len(weight_VD)):
                    shares_CR = shares_RV[:, columns].to(dtype).t()
                    write_product(grad_VD[columns], shares_CR, grad_ND[part].to(dtype), add=part.start > 0)
        return None, grad_VD.to(weight_VD.dtype), None, None


def _softmax_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None, chunk_logits: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of rows and softmax of their logits (R, V), which lies where the next chunk's is written."""
    for part, z_RV in logit_chunks(hidden_ND, weight_VD, chunk_logits, 1 / (softcap or 1.0)):
        for rows in cached_rows(z_RV):
            logits_RV = z_RV[rows] if softcap is None else z_RV[rows].tanh_().mul_(softcap)
            logits_RV.sub_(logits_RV.amax(dim=1, keepdim=True)).exp_()
            logits_RV /= logits_RV.sum(dim=1, keepdim=True)
        yield part, z_RV
