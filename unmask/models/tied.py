"""One gradient for an embedding that is the head too.

The head's gradient is as large as the embedding and has something to say of every entry; a lookup's is as large and
nearly all zeros. Autograd would fill one for each use and add them up. Here each use hands the weight on to the next,
so that the next one's gradient comes back through it, and what it has to add goes into that.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unmask.ops.rows import add_rows

Use = Callable[[Tensor], tuple[Tensor, Tensor]]


class Chain:
    """The uses of one embedding's weight, each handing it on to the next, between `open` and its end.

    Outside, and where no gradient is taken, every use has the weight itself.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._latest_VD: Tensor | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Chain the uses until the end of the block, one block at a time.

        Whatever uses `weight` there must return a gradient that nobody else holds. Backward runs once.
        """
        if self._is_open:
            raise RuntimeError("this embedding's uses are being chained already: make one loss of a model at a time")
        self._is_open = True
        try:
            yield
        finally:
            self._is_open, self._latest_VD = False, None

    def weight(self, embedding: nn.Module) -> Tensor:
        """Return the weight as the latest use has handed it on."""
        return embedding.weight if self._latest_VD is None else self._latest_VD  # pyright: ignore[reportReturnType]

    def use(self, embedding: nn.Module, use: Use) -> Tensor:
        """Return the result of a use, and hand the weight that comes with it on to the next."""
        result, handed_on_VD = use(self.weight(embedding))
        if self._is_open and torch.is_grad_enabled():
            self._latest_VD = handed_on_VD
        return result

    def look_up(self, embedding: nn.Module, ids: Tensor) -> Tensor:
        """Return the embeddings of ids, (…, D)."""
        # A module that stands in for an embedding, and hooks of one, do more than look up. On other devices the rows of
        # a token that occurs often would be added one after another, each rounded to the weight's dtype, where
        # PyTorch's own backward pass adds them up in parallel first.
        plain = type(embedding) is nn.Embedding and not (embedding._forward_hooks or embedding._forward_pre_hooks)
        chained = self._is_open and torch.is_grad_enabled() and ids.device.type == "cpu"
        if not (plain and chained and embedding.weight.requires_grad):
            return embedding(ids)
        padding_idx: Any = embedding.padding_idx
        return self.use(embedding, lambda weight_VD: look_up(weight_VD, ids, padding_idx))


def look_up(weight_VD: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """Return weight_VD[ids] and the weight for its next use, to whose gradient the lookup's is added in place.

    Args:
        weight_VD: the embedding, or what an earlier use handed on.
        ids: int64, any shape.
        padding_idx: id whose row gets no gradient from the lookup; None = there is none.

    Returns:
        (…, D), and the weight. Its user must return a gradient that nobody else holds.
    """
    return _LookUp.apply(weight_VD, ids, padding_idx)  # pyright: ignore[reportReturnType]


def to_add_to(grad_VD: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient that came back from the weight's next use, as memory to add to; zeros where none came."""
    if grad_VD is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return grad_VD.contiguous()  # that of a sum is one number, seen everywhere


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the rows, and the weight."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.shape, ctx.dtype = padding_idx, weight_VD.shape, weight_VD.dtype
        return F.embedding(ids, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_VD: Tensor | None) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add the rows' gradients to the weight's."""
        (ids,) = ctx.saved_tensors
        if grad is None:
            return grad_VD, None, None
        grad_VD = to_add_to(grad_VD, ctx.shape, ctx.dtype, grad.device)
        ids_N, grad_ND = ids.flatten(), grad.reshape(-1, grad.shape[-1])
        if ctx.padding_idx is not None:
            grad_ND = torch.where((ids_N == ctx.padding_idx)[:, None], 0.0, grad_ND)
        add_rows(grad_VD, ids_N, grad_ND)
        return grad_VD, None, None
