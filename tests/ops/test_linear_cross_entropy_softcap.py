"""The fused head with softcapped logits against the dense formula: values, gradients, and what is never held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.ops import chunks
from unmask.ops.head import Head
from unmask.ops.linear_cross_entropy import linear_cross_entropy

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, head, targets, weights


def inputs(rows: int = 7, width: int = 6, vocabulary: int = 11, seed: int = 0, dtype=torch.float32) -> Inputs:
    """Random hidden states and head, both with gradients, targets and positive weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden, matrix = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, vocabulary))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) * 3 + 0.1
    return hidden.requires_grad_(), matrix.requires_grad_(), targets, weights.to(dtype)


def fused(values: Inputs, cap: float | None, **options: Any) -> Tensor:
    hidden, matrix, targets, weights = values
    return linear_cross_entropy(hidden, Head(matrix, softcap=cap), targets, weights, **options)[0]


def dense(values: Inputs, cap: float | None) -> Tensor:
    hidden, matrix, targets, weights = values
    logits = hidden @ matrix.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def gradients(loss: Tensor, values: Inputs) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss * 0.37, values[:2]))


@given(
    rows=st.integers(1, 9),
    chunk=st.sampled_from([1, 30, 70, 10**6]),
    cap=st.sampled_from([0.5, 3.0, 30.0, 100.0]),
    tile=st.sampled_from([1, 4, 4096]),
    seed=st.integers(0, 999),
)
def test_equals_the_dense_formula_in_fp64(rows: int, chunk: int, cap: float, tile: int, seed: int) -> None:
    values = inputs(rows, seed=seed, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CAST_ROWS", tile)
        ours = gradients(fused(values, cap, chunk_logits=chunk), values)
    assert ours[0].dtype == torch.float64
    torch.testing.assert_close(ours, gradients(dense(values, cap), values), atol=1e-11, rtol=1e-9)


def test_the_slope_is_that_of_finite_differences() -> None:
    values = inputs(3, 2, 5, dtype=torch.float64)
    _, *grads = gradients(fused(values, 0.7), values)
    for value, grad in zip(values[:2], grads, strict=True):
        for place in range(value.numel()):
            with torch.no_grad():
                value.view(-1)[place] += 1e-6
                above = fused(values, 0.7)
                value.view(-1)[place] -= 2e-6
                below = fused(values, 0.7)
                value.view(-1)[place] += 1e-6
            assert float(grad.view(-1)[place]) == pytest.approx(0.37 * float(above - below) / 2e-6, abs=1e-8)


def test_without_a_cap_or_far_below_it_nothing_is_capped() -> None:
    values = inputs(dtype=torch.float64)
    plain = gradients(fused(values, None), values)
    torch.testing.assert_close(gradients(fused(values, 1e6), values), plain)
    assert float((gradients(fused(values, 1.0), values)[0] - plain[0]).abs()) > 0.1


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_saturated_logits_have_no_slope_and_stay_finite(scale: float) -> None:
    hidden, matrix, targets, weights = inputs(5)
    values = ((hidden.detach() * scale).requires_grad_(), matrix, targets, weights)
    ours = gradients(fused(values, 2.0), values)
    assert all(torch.isfinite(value).all() for value in ours)
    # A saturated logit is ±2: no cross-entropy exceeds log Σ exp(2) + 2.
    assert float(ours[0]) < float(weights.sum()) * (torch.tensor(11.0).log() + 4)
    torch.testing.assert_close(ours, gradients(dense(values, 2.0), values), atol=1e-3, rtol=1e-3)


def test_rows_of_weight_zero_are_ignored_whatever_they_hold() -> None:
    hidden, matrix, targets, weights = inputs(6, dtype=torch.float64)
    kept = torch.tensor([True, False, True, False, False, True])
    spoilt = hidden.detach().clone()
    spoilt[1], spoilt[3] = torch.nan, torch.inf
    odd = torch.where(kept, targets, torch.tensor([0, -100, 0, 10**6, -1, 0]))
    values = (spoilt.requires_grad_(), matrix, odd, weights * kept)
    ours = gradients(fused(values, 3.0, chunk_logits=50), values)
    exact = (hidden[kept].detach().requires_grad_(), matrix, targets[kept], weights[kept])
    loss, of_hidden, of_matrix = gradients(dense(exact, 3.0), exact)
    torch.testing.assert_close((ours[0], ours[1][kept], ours[2]), (loss, of_hidden, of_matrix))
    assert (ours[1][~kept] == 0).all()


@pytest.mark.parametrize("tile", [3, 2**14])
def test_under_autocast_close_to_autocast_of_the_dense_loss(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are rounded to bf16; cap, softmax and sums are not."""
    monkeypatch.setattr(chunks, "CAST_ROWS", tile)
    values = inputs(20, 32, 50)

    def rounded() -> Tensor:
        hidden, matrix, targets, weights = values
        logits = 5 * torch.tanh((hidden @ matrix.T).float() / 5)
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    exact = gradients(dense(values, 5.0), values)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(fused(values, 5.0), values), gradients(rounded(), values)
    assert all(value.dtype == torch.float32 for value in ours)

    def errors(found: tuple[Tensor, ...]) -> list[float]:
        return [float((one - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True)]

    assert max(errors(theirs)) > 1e-4  # autocast does round
    assert all(one < max(2 * two, 1e-3) for one, two in zip(errors(ours), errors(theirs), strict=True))
    assert max(errors(ours)) < 0.02


@pytest.mark.parametrize("cap", [30.0, 40.0, 41.0, 200.0])
def test_logits_far_below_the_cap_are_exact_in_fp32(cap: float) -> None:
    """Also where every logit of a row is −cap or nearly, and exp(logit − cap) is as small as it gets."""
    hidden, matrix, targets, weights = inputs(5, width=8, vocabulary=40)
    low = -hidden.detach().abs() * torch.tensor([[1.0], [10.0], [30.0], [100.0], [1000.0]])
    values = (low.requires_grad_(), matrix.detach().abs().requires_grad_(), targets, weights)
    wide = tuple(value.detach().double() for value in values)
    exact = (wide[0].requires_grad_(), wide[1].requires_grad_(), targets, wide[3])
    for ours, theirs in zip(gradients(fused(values, cap), values), gradients(dense(exact, cap), exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 30.0, 100.0])
def test_a_sure_prediction_keeps_its_small_gradient_under_autocast(cap: float | None) -> None:
    """1 − p of the target is far below what bf16 resolves beside 1; its gradient must not be rounded away with p."""
    matrix = torch.eye(4).requires_grad_()
    values = (torch.tensor([[9.0, 0.0, 0.0, 0.0]]).requires_grad_(), matrix, torch.tensor([0]), torch.ones(1))
    expected = gradients(dense(values, cap), values)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(fused(values, cap), values)[1]
    assert 0 < float(expected.abs().max()) < 2**-9
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_head_or_frozen_hidden_states(frozen: int) -> None:
    values = inputs(dtype=torch.float64)
    expected = gradients(dense(values, 3.0), values)
    values[frozen].requires_grad_(False)
    (grad,) = torch.autograd.grad(fused(values, 3.0) * 0.37, [values[1 - frozen]])
    torch.testing.assert_close(grad, expected[2 - frozen])


class Floats(TorchDispatchMode):
    """Records the largest tensor of floats that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_logits_never_exist_whole(grad: bool) -> None:
    rows, width, vocabulary = 64, 4, 300
    values = inputs(rows, width, vocabulary)
    mode: Callable[[], Any] = torch.enable_grad if grad else torch.no_grad
    with mode(), Floats() as largest:
        loss = fused(values, 30.0, chunk_logits=1500)
        if grad:
            loss.backward()
    assert largest.numel <= 1500  # five rows of logits
    assert rows * vocabulary > 12 * largest.numel
