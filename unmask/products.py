"""Products of large fp32 matrices, by the library that this CPU is fast with.

PyTorch multiplies fp32 on x86 with Intel's MKL, which on AMD's processors does not use AVX-512: two cores of an EPYC
(Zen 5, torch 2.13) have 175 GFLOP/s by it and 400 by oneDNN, which PyTorch carries too and uses for bf16. What is asked
of it here is the operation of compiled models, `mkldnn::_linear_pointwise`. It has no gradient: `linear` has one of its
own, and the other functions leave products whose gradient is wanted to PyTorch.

Shapes: M rows, K summed, N columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiplications from which on a product is worth a kernel, which oneDNN makes anew for each shape (some 3 ms).
_LARGE = 2**26
# Numbers that are made at a time on the way into given memory (1 MiB): they are read again while in the cache, and the
# C library does not give that much back to the system, to take it again page by page.
_AT_ONCE = 2**18


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Say whether fp32 products go by oneDNN: on AMD's processors with AVX-512, where PyTorch has both libraries."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        str(capabilities.get("cpu_name", "")).startswith("AMD")
        and bool(capabilities.get("avx512_f"))
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(hidden: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return hidden @ weightᵀ + bias, (..., N) of hidden (..., K); differentiable once in all three."""
    if not _large(hidden, weight_NK.t()):
        return F.linear(hidden, weight_NK, bias_N)
    if by_onednn(hidden, weight_NK.t()):
        return _onednn(hidden, weight_NK.t(), bias_N)
    return _Linear.apply(hidden, weight_NK, bias_N)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return hidden @ weightᵀ + bias."""
        ctx.save_for_backward(hidden, weight_NK)
        return _onednn(hidden, weight_NK.t(), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of those that want one."""
        hidden, weight_NK = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad
        grad_MN, hidden_MK = grad.reshape(-1, grad.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        return (
            _onednn(grad_MN, weight_NK).view_as(hidden) if wants_hidden else None,
            _onednn(grad_MN.t(), hidden_MK) if wants_weight else None,
            grad_MN.sum(dim=0) if wants_bias else None,
        )


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Return left @ right, (M, N)."""
    return _onednn(left_MK, right_KN) if by_onednn(left_MK, right_KN) else left_MK @ right_KN


def write_product(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor, factor: float = 1.0) -> Tensor:
    """Write factor · left @ right to `out`, of any dtype, and return it."""
    if by_onednn(left_MK, right_KN):
        for part in _parts(out_MN):
            torch.mul(_onednn(left_MK[part], right_KN), factor, out=out_MN[part])
        return out_MN
    if left_MK.dtype == out_MN.dtype:
        return torch.addmm(out_MN, left_MK, right_KN, beta=0, alpha=factor, out=out_MN)
    return torch.mul(torch.mm(left_MK, right_KN), factor, out=out_MN)


def add_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Add left @ right to `total`, of any dtype, in place."""
    if by_onednn(left_MK, right_KN) and not left_MK.is_contiguous():
        for part in _parts(left_MK.t()):
            total_MN += _onednn(left_MK[:, part], right_KN[part])
    elif by_onednn(left_MK, right_KN):
        for part in _parts(total_MN):
            total_MN[part] += _onednn(left_MK[part], right_KN)
    elif left_MK.dtype == total_MN.dtype:
        total_MN.addmm_(left_MK, right_KN)
    else:
        total_MN += torch.mm(left_MK, right_KN)


def write_columns(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Write left @ right, of few rows and many columns, to `out` of their dtype, and return it."""
    if not by_onednn(left_MK, right_KN):
        return torch.mm(left_MK, right_KN, out=out_MN)
    for part in _parts(out_MN.t()):
        out_MN[:, part].copy_(_onednn(left_MK, right_KN[:, part]))
    return out_MN


def _parts(matrix_MN: Tensor) -> list[slice]:
    """Divide a matrix's rows into parts of `_AT_ONCE` numbers."""
    rows, columns = matrix_MN.shape
    size = max(1, _AT_ONCE // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _onednn(left: Tensor, right_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right_KN.t(), bias_N, "none", [], "")


def by_onednn(left_MK: Tensor, right_KN: Tensor) -> bool:
    """Say whether a product goes by oneDNN: a large one whose gradient nobody will ask for."""
    wanted = torch.is_grad_enabled() and (left_MK.requires_grad or right_KN.requires_grad)
    return not wanted and _large(left_MK, right_KN)


def _large(left: Tensor, right_KN: Tensor) -> bool:
    """Say whether oneDNN is faster with a product: a large one of plain fp32 matrices, which autocast leaves fp32.

    The left one is copied if it is not contiguous, which pays for a transposed one.
    """
    pair = (left, right_KN)
    return (
        left.numel() * right_KN.shape[1] >= _LARGE
        and all(matrix.dtype == torch.float32 and matrix.device.type == "cpu" for matrix in pair)
        and all(type(matrix) in (Tensor, nn.Parameter) for matrix in pair)
        and (left.is_contiguous() or (left.dim() == 2 and left.t().is_contiguous()))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
    )
