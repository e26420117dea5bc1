"""The fused head against a dense cross-entropy: values, gradients, and what must never be computed or held."""

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

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def inputs(rows: int = 7, width: int = 6, vocabulary: int = 11, bias: bool = True, seed: int = 0) -> Inputs:
    """Random hidden states, head, bias, targets and positive weights; the first three require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) * 3 + 0.1
    return normal(rows, width), normal(vocabulary, width), normal(vocabulary) if bias else None, targets, weights


def fused(*values: Any, **options: Any) -> Tensor:
    hidden, matrix, bias, targets, weights = values
    softcap = options.pop("softcap", None)
    return linear_cross_entropy(hidden, Head(matrix, bias, softcap), targets, weights, **options)[0]


def dense(hidden: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden, matrix, bias).float(), targets, reduction="none")
    return (losses * weights).sum()


def gradients(loss: Callable[..., Tensor], values: Inputs, scale: float = 0.37) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients of `scale` times it in hidden, head and bias."""
    leaves = [value for value in values[:3] if value is not None]
    total = loss(*values)
    return total.detach(), list(torch.autograd.grad(total * scale, leaves))


class Largest(TorchDispatchMode):
    """Records the largest tensor of floats that any operation returned, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += any(name in str(function) for name in (".mm.", ".addmm", ".bmm."))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


@given(
    rows=st.integers(1, 9),
    chunk=st.integers(1, 120),
    bias=st.booleans(),
    cast_rows=st.sampled_from([1, 4, 2**14]),
    seed=st.integers(0, 999),
)
def test_equals_the_dense_loss_for_every_chunk(rows: int, chunk: int, bias: bool, cast_rows: int, seed: int) -> None:
    values = inputs(rows, bias=bias, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CAST_ROWS", cast_rows)
        ours = gradients(lambda *v: fused(*v, chunk_logits=chunk), values)
    theirs = gradients(dense, values)
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 22, 10**6])
def test_fp64_is_exact_to_finite_differences(chunk: int) -> None:
    hidden, matrix, bias, targets, weights = inputs(4, 3, 5)
    wide = [value.detach().double().requires_grad_() for value in (hidden, matrix, bias) if value is not None]
    loss, grads = gradients(lambda *v: fused(*v, chunk_logits=chunk), (*wide, targets, weights), 1.0)  # type: ignore[arg-type]
    assert loss.dtype == torch.float64
    step = 1e-6
    for value, grad in zip(wide, grads, strict=True):
        for place in range(value.numel()):
            with torch.no_grad():
                value.view(-1)[place] += step
                above = fused(*wide, targets, weights)  # type: ignore[call-arg]
                value.view(-1)[place] -= 2 * step
                below = fused(*wide, targets, weights)  # type: ignore[call-arg]
                value.view(-1)[place] += step
            assert float(grad.view(-1)[place]) == pytest.approx(float(above - below) / (2 * step), abs=1e-8)


def test_rows_of_weight_zero_are_ignored_whatever_they_hold() -> None:
    hidden, matrix, bias, targets, weights = inputs(6)
    kept = torch.tensor([True, False, True, False, False, True])
    spoilt = hidden.detach().clone()
    spoilt[1], spoilt[3] = torch.nan, torch.inf
    spoilt.requires_grad_()
    odd = targets.clone()
    odd[~kept] = torch.tensor([-100, 10**6, -1])
    ours = gradients(fused, (spoilt, matrix, bias, odd, weights * kept))
    theirs = gradients(dense, (hidden, matrix, bias, targets, weights * kept))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours[1][0][~kept] == 0).all()


def test_no_rows_at_all() -> None:
    for rows, weights in ((0, torch.zeros(0)), (3, torch.zeros(3))):
        hidden, matrix, bias, targets, _ = inputs(rows)
        loss, grads = gradients(fused, (hidden, matrix, bias, targets, weights))
        assert loss == 0 and all((grad == 0).all() for grad in grads)
        assert [grad.shape for grad in grads] == [hidden.shape, matrix.shape, (11,)]


def test_a_tied_matrix_receives_both_gradients() -> None:
    _, matrix, _, targets, weights = inputs(5, bias=False)
    tokens = torch.tensor([1, 3, 3, 0, 10])

    def grad(loss: Callable[..., Tensor]) -> Tensor:
        total = loss(F.embedding(tokens, matrix).sin(), matrix, None, targets, weights)
        return torch.autograd.grad(total, matrix)[0]

    torch.testing.assert_close(grad(fused), grad(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [(1, 2), (0,), (0, 2), (2,)])
def test_frozen_inputs_get_no_gradient_and_no_buffer(frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    values = inputs(3, 40, 200)
    for place in frozen:
        values[place].requires_grad_(False)  # type: ignore[union-attr]
    asked = [value for value in values[:3] if value is not None and value.requires_grad]
    expected = torch.autograd.grad(dense(*values), asked)
    with Largest() as largest:
        total = fused(*values)
        ours = torch.autograd.grad(total, asked)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    # The transposed view of the head has its size; a buffer for its gradient would be a product more.
    assert largest.products == 3 - len({0, 1} & set(frozen))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_computed(mode: Callable[[], Any]) -> None:
    values = inputs(3, 40, 200)
    with mode(), Largest() as largest:
        loss = fused(*values)
    assert largest.products == 1
    assert not loss.requires_grad
    torch.testing.assert_close(loss, dense(*values).detach())
    with Largest() as trained:
        fused(*values)
    assert trained.products == 3


def test_logits_never_exist_whole() -> None:
    rows, width, vocabulary = 64, 8, 300
    values = inputs(rows, width, vocabulary)
    with Largest() as largest:
        fused(*values, chunk_logits=1500).backward()
    assert largest.numel <= max(vocabulary * width, 1500) < rows * vocabulary / 7


def test_a_head_below_compute_precision_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CAST_ROWS", 16)
    hidden, matrix, bias, targets, weights = inputs(2, 64, 300)
    matrix.requires_grad_(False)

    class Cast(Largest):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.bfloat16:
                self.numel = max(self.numel, result.numel())
            return result

    with torch.autocast("cpu", torch.bfloat16), Cast() as largest:
        fused(hidden, matrix, bias, targets, weights)
    assert 0 < largest.numel <= 16 * 64


@pytest.mark.parametrize("cast_rows", [3, 2**14])
def test_under_autocast_close_to_autocast_of_the_dense_loss(cast_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CAST_ROWS", cast_rows)
    values = inputs(20, 32, 50)
    exact = gradients(dense, values)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(fused, values), gradients(dense, values)
    assert [grad.dtype for grad in ours[1]] == [torch.float32] * 3

    def error(result: tuple[Tensor, list[Tensor]]) -> list[float]:
        pairs = zip([result[0], *result[1]], [exact[0], *exact[1]], strict=True)
        return [float((one.float() - two).norm() / two.norm()) for one, two in pairs]

    assert max(error(theirs)) > 1e-4  # autocast does round
    assert all(one < max(2 * two, 1e-3) for one, two in zip(error(ours), error(theirs), strict=True))
    assert max(error(ours)) < 0.02


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_fp16_sums_over_a_vocabulary_neither_overflow_nor_vanish(softcap: float | None) -> None:
    hidden, matrix, _, targets, _ = inputs(8, 16, 4096, bias=False)
    with torch.no_grad():
        hidden *= 0.1
        matrix *= 0.05
        matrix[:, 0] += 20  # a column's sum over the vocabulary is above fp16's largest number
        hidden[:, 0] = 0.001
    values = (hidden, matrix, None, targets, torch.full((8,), 1 / 2048))
    theirs = gradients(lambda *v: fused(*v, softcap=softcap), values)
    with torch.autocast("cpu", torch.float16):
        ours = gradients(lambda *v: fused(*v, softcap=softcap), values)
    for one, two in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert float((one - two).norm() / two.norm()) < 2e-3
    # Each entry but the targets' is small: 1 / 4096 of a weight of 1 / 2048.
    others = torch.ones(4096, dtype=torch.bool)
    others[targets] = False
    assert float((ours[1][1] - theirs[1][1])[others].norm() / theirs[1][1][others].norm()) < 2e-3


@pytest.mark.parametrize("chunk", [50, 10**6])
def test_bf16_weights_sum_their_gradients_in_fp32(chunk: int) -> None:
    hidden, matrix, bias, targets, weights = inputs(300, 32, 50)
    low = [value.detach().bfloat16().requires_grad_() for value in (hidden, matrix, bias) if value is not None]
    ours = gradients(lambda *v: fused(*v, chunk_logits=chunk), (*low, targets, weights))  # type: ignore[arg-type]
    raised = tuple(value.detach().float().requires_grad_() for value in low)
    theirs = gradients(dense, (*raised, targets, weights))  # type: ignore[arg-type]
    assert ours[0].dtype == torch.float32
    assert [grad.dtype for grad in ours[1]] == [torch.bfloat16] * 3
    for one, two in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        # One rounding to bf16 is 2^-9 relative; three hundred roundings would be far above.
        assert float((one.float() - two).norm() / two.norm()) < 5e-3


@pytest.mark.parametrize("scale", [1e-4, 1e2, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    hidden, matrix, bias, targets, weights = inputs(5)
    values = ((hidden.detach() * scale).requires_grad_(), matrix, bias, targets, weights)
    ours, theirs = gradients(fused, values), gradients(dense, values)
    assert all(torch.isfinite(grad).all() for grad in ours[1])
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1, scale), rtol=1e-4)


def test_the_incoming_gradient_scales_and_a_second_backward_is_refused() -> None:
    values = inputs()
    _, once = gradients(fused, values, scale=1.0)
    _, tripled = gradients(fused, values, scale=-3.0)
    torch.testing.assert_close([grad * -3 for grad in once], tripled)
    loss = fused(*values) * 2
    loss.backward(retain_graph=True)
    # The buffers were scaled in place: a second pass would be wrong, so it must not happen silently.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    (first,) = torch.autograd.grad(fused(*values), values[0], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("scale", [1, 3])
def test_a_gradient_that_was_handed_out_is_never_written_again(scale: int) -> None:
    """The loss is the last operation of a step: what was saved is then the gradient as it stands."""
    values = inputs()
    leaves = [value for value in values[:3] if value is not None]
    theirs = torch.autograd.grad(dense(*values), leaves)
    loss = fused(*values)
    ours = torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss * scale, leaves)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trains", [True, False])
def test_each_positions_loss_comes_with_their_sum(trains: bool) -> None:
    hidden, matrix, bias, targets, weights = inputs(6)
    assert bias is not None
    bias.data[0] = -torch.inf  # an id that cannot be; an ignored position's target is looked up as 0
    targets, weights = targets.clamp(min=1), weights * torch.tensor([1, 1, 0, 1, 0, 1])
    with torch.set_grad_enabled(trains):
        total, losses = linear_cross_entropy(hidden, Head(matrix, bias), targets, weights, chunk_logits=22)
    expected = F.cross_entropy(F.linear(hidden, matrix, bias), targets, reduction="none").detach()
    torch.testing.assert_close(losses, torch.where(weights > 0, expected, 0.0))
    torch.testing.assert_close(total.detach(), (expected * weights).sum())
    assert total.requires_grad == trains and not losses.requires_grad
