"""The soft embedding made of some columns at a time against the formula: values, gradient, dtypes, largest tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.ops import chunks
from unmask.ops.head import Head
from unmask.ops.soft_embedding import soft_embedding

ROWS, WIDTH, VOCABULARY = 10, 8, 60


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(hidden: Tensor, head: Head) -> Tensor:
    with torch.no_grad():
        shares = head.logits(hidden).softmax(dim=-1, dtype=torch.float32)
    return shares.to(head.weight.dtype) @ head.weight


@pytest.mark.parametrize("cap", [0.5, 30.0, 1e4, None])
@pytest.mark.parametrize("columns", [1, 7, 60, 2**14])
def test_equals_the_formula(columns: int, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many columns at a time, and however far apart the logits lie."""
    monkeypatch.setattr(chunks, "CAST_ROWS", columns)
    hidden, weight = 20 * normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH, seed=1).requires_grad_()
    hidden[:3] *= 10
    hidden.requires_grad_()
    head, probe = Head(weight, softcap=cap, scale=0.5), normal(ROWS, WIDTH, seed=2)
    found, expected = soft_embedding(hidden, head), reference(hidden, head)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(made, [weight, hidden], probe, allow_unused=True) for made in (found, expected))
    assert ours[1] is theirs[1] is None  # the logits are constants
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-3)
    weight.requires_grad_(False)
    assert not soft_embedding(hidden, head).requires_grad


def test_uses_of_a_tied_embedding_add_up() -> None:
    weight, ids = normal(VOCABULARY, WIDTH, seed=1).requires_grad_(), torch.tensor([3, 3, 5])

    def total(mixed: Tensor) -> Tensor:
        return (mixed.sum() + weight[ids].sin().sum() + weight.square().sum()) * 2

    head = Head(weight, softcap=30.0)
    ours, theirs = (
        torch.autograd.grad(total(made), weight)[0]
        for made in (soft_embedding(normal(ROWS, WIDTH), head), reference(normal(ROWS, WIDTH), head))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_weights_and_autocast(narrow: torch.dtype) -> None:
    hidden, weight = 20 * normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH, seed=1)
    short = Head(weight.to(narrow), softcap=30.0)
    low = soft_embedding(hidden.to(narrow), short)
    assert low.dtype == narrow
    torch.testing.assert_close(low, reference(hidden.to(narrow), short), atol=0.1, rtol=0.05)
    head = Head(weight.requires_grad_(), softcap=30.0)
    with torch.autocast("cpu", narrow):
        cast = soft_embedding(hidden, head)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, reference(hidden, head), atol=0.1, rtol=0.05)
    (grad,) = torch.autograd.grad(cast.sum(), weight)
    (expected,) = torch.autograd.grad(reference(hidden, head).sum(), weight)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected, atol=0.1, rtol=0.05)


def test_no_rows_at_all() -> None:
    weight = normal(VOCABULARY, WIDTH).requires_grad_()
    found = soft_embedding(torch.zeros(0, WIDTH), Head(weight, softcap=30.0))
    assert found.shape == (0, WIDTH)
    assert not torch.autograd.grad(found.sum(), weight)[0].any()


class Floats(TorchDispatchMode):
    """Records the largest tensor of floats that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CAST_ROWS", 5)
    weight = normal(VOCABULARY, WIDTH).requires_grad_()
    with Floats() as floats:
        soft_embedding(normal(64, WIDTH), Head(weight, softcap=30.0)).sum().backward()
    assert floats.numel <= max(64 * 5, weight.numel(), 64 * WIDTH) < 64 * VOCABULARY / 5
