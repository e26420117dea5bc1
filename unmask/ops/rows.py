"""Taking rows of a tensor so that their gradients add up in the same order in every run, whatever the device.

Where a row is taken several times, its gradients meet, and a sum that threads race for is rounded differently each
time: two starts of one command would part. `tensor[index]` adds in a fixed order on CUDA, where it sorts, but on CPUs
several threads add atomically; `index_select` and `index_add_` are the other way round
(PyTorch, aten/src/ATen/native/cpu/IndexKernel.cpp, index_put_kernel, and native/cuda/Indexing.cu).

Shapes: N rows, M places taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def take_rows(rows_N: Tensor, index_M: Tensor) -> Tensor:
    """Return rows_N[index_M]; any shape after the first dimension.

    Args:
        rows_N: (N, …).
        index_M: int64 in 0..N-1, with repetitions or without.
    """
    return rows_N.index_select(0, index_M) if rows_N.device.type == "cpu" else rows_N[index_M]


def add_rows(total_N: Tensor, index_M: Tensor, rows_M: Tensor) -> None:
    """Add each of rows_M to the row of total_N that its index names, in place, one after another as they are given.

    Args:
        total_N: (N, …).
        index_M: int64 in 0..N-1, with repetitions or without.
        rows_M: (M, …), in the dtype of `total_N`.
    """
    if total_N.device.type == "cpu":
        total_N.index_add_(0, index_M, rows_M)
    else:
        total_N.index_put_((index_M,), rows_M, accumulate=True)


def inverse(order_M: Tensor) -> Tensor:
    """Return the permutation that undoes `order_M`, int64 (M,)."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


def permute_rows(rows_M: Tensor, order_M: Tensor, back_M: Tensor, copies: int = 1) -> Tensor:
    """Return the rows in another order; forward and backward only read at an index, none adds at one.

    Args:
        rows_M: (M / copies, …).
        order_M: permutation of 0..M-1, int64; its entry m takes row m // copies.
        back_M: its inverse.
        copies: how often each row occurs.

    Returns:
        (M, …).
    """
    return _Permuted.apply(rows_M, order_M, back_M, copies)  # pyright: ignore[reportReturnType]


class _Permuted(torch.autograd.Function):
    """A row's gradients lie side by side once they are brought back, and their sum is one over a dimension."""

    @staticmethod
    def forward(ctx: Any, rows_M: Tensor, order_M: Tensor, back_M: Tensor, copies: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the rows in their new order."""
        ctx.save_for_backward(back_M)
        ctx.copies = copies
        return rows_M.index_select(0, order_M if copies == 1 else order_M // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient in the old order, summed over copies."""
        (back_M,) = ctx.saved_tensors
        grad = grad_M.index_select(0, back_M)
        if ctx.copies > 1:
            grad = grad.unflatten(0, (len(grad) // ctx.copies, ctx.copies)).sum(dim=1)
        return grad, None, None, None
