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

# Multiplications from which on a product is worth a kernel, which oneDNN makes for each shape in some 3 ms: a shape
# comes back in the next layer, tile or call.
_LARGE = 2**26
# Numbers that are made at a time on the way into given memory (1 MiB), if that are rows enough for a product: they are
# read again while in the cache, and the C library does not give that much back to the system, to take it again page by
# page. A total that is added to as a whole may be four times as large.
_AT_ONCE, _ROWS = 2**18, 128


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
    if not _large(hidden, weight_NK, len(weight_NK)):
        return F.linear(hidden, weight_NK, bias_N)
    given = (hidden, weight_NK) if bias_N is None else (hidden, weight_NK, bias_N)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Linear.apply(hidden, weight_NK, bias_N)  # pyright: ignore[reportReturnType]
    return _onednn(hidden, weight_NK.t(), bias_N)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return hidden @ weightᵀ + bias; keep what the gradients that are wanted need."""
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(hidden if wants_weight else None, weight_NK if wants_hidden else None)
        return _onednn(hidden, weight_NK.t(), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of those that want one."""
        hidden, weight_NK = ctx.saved_tensors
        grad_MN = grad.reshape(-1, grad.shape[-1])
        return (
            None if weight_NK is None else _onednn(grad, weight_NK),
            None if hidden is None else _onednn(grad_MN.t(), hidden.reshape(-1, hidden.shape[-1])),
            grad_MN.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Return left @ right, (M, N); the left one may have more dimensions."""
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
    fast = by_onednn(left_MK, right_KN)
    if fast and left_MK.is_contiguous():
        for part in _parts(total_MN):
            total_MN[part] += _onednn(left_MK[part], right_KN)
    elif fast and total_MN.numel() <= 4 * _AT_ONCE:
        # Transposed, it is copied a part at a time.
        for part in _parts(left_MK.t()):
            total_MN += _onednn(left_MK[:, part], right_KN[part])
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
    """Divide a matrix's rows into parts of `_AT_ONCE` numbers, or of `_ROWS` rows if those are more."""
    rows, columns = matrix_MN.shape
    size = max(_ROWS, _AT_ONCE // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _onednn(left: Tensor, right_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right_KN.t(), bias_N, "none", [], "")


def by_onednn(left: Tensor, right_KN: Tensor) -> bool:
    """Say whether a product goes by oneDNN: a large one whose gradient nobody will ask for."""
    wanted = torch.is_grad_enabled() and (left.requires_grad or right_KN.requires_grad)
    return not wanted and _large(left, right_KN, right_KN.shape[1])


def _large(left: Tensor, right: Tensor, columns: int) -> bool:
    """Say whether oneDNN is faster with a product: a large one of plain fp32 matrices, which autocast leaves fp32.

    A left one that is transposed is copied, which pays. The size comes last: a graph that is compiled must not depend
    on it.

    Args:
        left, right: the matrices, `right` in either orientation.
        columns: of the product.
    """
    return (
        left.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
        and left.dtype == right.dtype == torch.float32
        and left.numel() * columns >= _LARGE
        and right.device.type == "cpu"
        and all(type(matrix) in (Tensor, nn.Parameter) for matrix in (left, right))
        and (left.is_contiguous() or (left.dim() == 2 and left.t().is_contiguous()))
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )
