"""Taking rows of a tensor so that their gradients add up in the same order in every run, whatever the device.

Where a row is taken several times, its gradients meet, and a sum that threads race for is rounded differently each
time: two starts of one command would part. `tensor[index]` adds in a fixed order on CUDA, where it sorts, but on CPUs
several threads add atomically; `index_select` is the other way round (PyTorch,
aten/src/ATen/native/cpu/IndexKernel.cpp, index_put_kernel, and native/cuda/Indexing.cu).

Where each row is taken once, as by a permutation, nothing is added and `index_select` will do.

Shapes: N rows, M places taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(rows_N: Tensor, index_M: Tensor) -> Tensor:
    """Return rows_N[index_M]; index int64 in 0..N-1, with repetitions or without, and any shape behind N."""
    return rows_N.index_select(0, index_M) if rows_N.device.type == "cpu" else rows_N[index_M]


def in_order(rows_ND: Tensor, order_M: Tensor, inverse_M: Tensor, times: int = 1) -> Tensor:
    """Return the rows, each repeated `times` times, in the order of a permutation; `inverse_M` undoes it.

    Gradients go the other way round and the `times` of a row are summed at once: nothing is sorted or added in turn.
    """
    return _InOrder.apply(rows_ND, order_M, inverse_M, times)  # pyright: ignore[reportReturnType]


class _InOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_M: Tensor, inverse_M: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.times = times
        return rows_ND.index_select(0, order_M if times == 1 else order_M // times)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        gradient_MD = _InOrder.apply(gradients[0], inverse_M, order_M, 1)
        if ctx.times > 1:
            gradient_MD = gradient_MD.unflatten(0, (-1, ctx.times)).sum(dim=1)  # pyright: ignore
        return gradient_MD, None, None, None


def inverse(order_M: Tensor) -> Tensor:
    """Return the permutation that undoes `order_M`, int64 (M,)."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
