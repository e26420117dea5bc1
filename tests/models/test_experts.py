"""Router and experts against a loop over tokens, in values and gradients, on the grouped kernel and without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.models import experts as experts_module
from unmask.models.diffusion_gemma.model import Router, gelu
from unmask.models.experts import (
    Experts,
    grouped_kernel,
    grouped_linear,
    local_dispatch,
    sort_by_expert,
    zeroes_unused,
)


def experts_of(count: int = 5, size: int = 8, width: int = 4, seed: int = 0) -> Experts:
    experts = Experts(count, size, width, gelu)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return experts


def routed(tokens: int, size: int, count: int, top: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, distinct experts for each, and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    scores = torch.rand(tokens, count, generator=generator)
    return hidden, scores.topk(top).indices, torch.rand(tokens, top, generator=generator).requires_grad_()


def slow(hidden: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for token, picks, shares in zip(hidden, chosen.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, share in zip(picks, shares, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            row = row + share * (experts.down_proj[expert] @ (F.gelu(gate, approximate="tanh") * up))
        rows.append(row)
    return torch.stack(rows)


def results(run: Callable[..., Tensor], hidden: Tensor, chosen: Tensor, weights: Tensor, experts: Experts):
    out = run(hidden, chosen, weights, experts)
    leaves = [hidden, weights, *experts.parameters()]
    return out.detach(), torch.autograd.grad(out.sin().sum(), leaves)


@given(
    tokens=st.integers(1, 12),
    count=st.integers(1, 6),
    share=st.floats(0, 1),
    size=st.sampled_from([4, 8, 3, 5]),
    width=st.sampled_from([4, 8, 3]),
    seed=st.integers(0, 999),
)
@settings(max_examples=15)
def test_equals_a_loop_over_tokens(tokens: int, count: int, share: float, size: int, width: int, seed: int) -> None:
    """Few tokens leave experts empty; sizes that are no multiple of four have no grouped kernel."""
    top = 1 + int(share * (count - 1))
    values = (*routed(tokens, size, count, top, seed), experts_of(count, size, width, seed))
    torch.testing.assert_close(results(local_dispatch, *values), results(slow, *values), atol=1e-4, rtol=1e-4)


def test_the_loop_and_the_grouped_kernel_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (*routed(9, 8, 5, 2), experts_of())
    assert grouped_kernel(values[0], values[3].gate_up_proj)
    assert not grouped_kernel(torch.zeros(9, 6), torch.zeros(5, 8, 6))  # 24 bytes a row
    assert not grouped_kernel(torch.zeros(9, 8), torch.zeros(5, 6, 8))
    assert not grouped_kernel(torch.zeros(9, 8).double(), torch.zeros(5, 8, 8).double())
    assert not grouped_kernel(torch.zeros(9, 4).bfloat16(), torch.zeros(5, 8, 4).bfloat16())  # 8 bytes a row
    grouped = results(local_dispatch, *values)
    monkeypatch.setattr(experts_module, "grouped_kernel", lambda *_: False)
    monkeypatch.setattr(F, "grouped_mm", None)
    torch.testing.assert_close(results(local_dispatch, *values), grouped, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 6], ids=["grouped", "loop"])
def test_experts_without_a_token_get_no_gradient(size: int) -> None:
    hidden, _, weights = routed(3, size, 5, 2)
    chosen = torch.tensor([[1, 4], [4, 1], [1, 4]])
    values = (hidden, chosen, weights, experts_of(5, size))
    ours, theirs = results(local_dispatch, *values), results(slow, *values)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for grad in ours[1][2:]:
        assert [bool(part.any()) for part in grad] == [False, True, False, False, True]


class Blackwell(torch.autograd.Function):
    """`F.grouped_mm` whose gradient of matrices without rows is what the memory held."""

    @staticmethod
    def forward(ctx: Any, rows_MI: Tensor, matrices_EIO: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MI, matrices_EIO, offs)
        return GROUPED_MM(rows_MI, matrices_EIO, offs=offs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_MI, matrices_EIO, offs = ctx.saved_tensors
        counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
        parts = zip(rows_MI.split(counts), gradients[0].split(counts), matrices_EIO, strict=True)
        grads = [
            (grad @ matrix.t(), rows.t() @ grad if len(rows) else matrix * torch.nan) for rows, grad, matrix in parts
        ]
        return torch.cat([grad for grad, _ in grads]), torch.stack([grad for _, grad in grads]), None


GROUPED_MM = F.grouped_mm


@pytest.mark.parametrize("mended", [True, False])
def test_a_kernel_that_leaves_gradients_unwritten_is_mended(mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = torch.tensor([[1, 4], [4, 1], [1, 4]])
    hidden, _, weights = routed(3, 8, 5, 2)
    values = (hidden, chosen, weights, experts_of())
    expected = results(slow, *values)
    monkeypatch.setattr(F, "grouped_mm", lambda rows, matrices, offs: Blackwell.apply(rows, matrices, offs))
    monkeypatch.setattr(experts_module, "zeroes_unused", lambda device: not mended)
    found = results(local_dispatch, *values)
    assert all(bool(grad.isfinite().all()) for grad in found[1]) == mended
    if mended:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("major", "kernel", "zeroes"),
    [(8, False, False), (9, True, True), (10, True, False), (12, False, False)],
    ids=["Ampere", "Hopper", "Blackwell", "Blackwell for desktops"],
)
def test_which_devices_have_a_kernel_and_write_zeros(major: int, kernel: bool, zeroes: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    rows, weight = (torch.zeros(*shape, dtype=torch.bfloat16, device="meta") for shape in ((9, 8), (5, 8, 8)))
    assert grouped_kernel(rows, weight) is kernel and not grouped_kernel(rows.float(), weight.float())
    assert zeroes_unused(torch.device("cuda")) is zeroes and zeroes_unused(torch.device("cpu"))


@pytest.mark.parametrize("size", [8, 6], ids=["grouped", "loop"])
def test_no_token_at_all_gives_every_leaf_a_gradient_of_zeros(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no rank sends a token here: the graph is whole, and no kernel is asked for nothing."""
    monkeypatch.setattr(F, "grouped_mm", None)
    hidden, weights = torch.zeros(0, size).requires_grad_(), torch.zeros(0, 2).requires_grad_()
    out, grads = results(local_dispatch, hidden, torch.zeros(0, 2, dtype=torch.int64), weights, experts_of(5, size))
    assert out.shape == (0, size)
    assert [grad.shape for grad in grads[2:]] == [(5, 8, size), (5, size, 4)]
    assert not any(grad.any() for grad in grads)


def test_all_experts_chosen_is_the_dense_mixture() -> None:
    experts, router = experts_of(), Router(8, 5, 5, 1e-6)
    hidden = routed(7, 8, 5, 5)[0].detach()
    chosen, weights = router(hidden)
    assert torch.equal(chosen.sort(dim=1).values, torch.arange(5).expand(7, 5))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(7))
    shares = torch.zeros(7, 5).scatter(1, chosen, weights)
    each = torch.stack(
        [slow(hidden, torch.full((7, 1), number), torch.ones(7, 1), experts) for number in range(5)], dim=1
    )
    torch.testing.assert_close(
        local_dispatch(hidden, chosen, weights, experts), (shares[..., None] * each).sum(1), atol=1e-5, rtol=1e-4
    )


@given(tokens=st.integers(0, 9), count=st.integers(1, 7), seed=st.integers(0, 99))
def test_sorting_keeps_every_pair(tokens: int, count: int, seed: int) -> None:
    chosen = torch.randint(0, count, (tokens, 2), generator=torch.Generator().manual_seed(seed))
    order, counts = sort_by_expert(chosen, count)
    flat = chosen.flatten()
    assert sorted(order.tolist()) == list(range(2 * tokens))
    assert counts.tolist() == [int((flat == number).sum()) for number in range(count)]
    assert flat[order].tolist() == sorted(flat.tolist())
    # Pairs of one expert stay in the order of their tokens, so that sums are the same in every run.
    assert all(a < b for a, b in zip(order, order[1:], strict=False) if flat[a] == flat[b])


@pytest.mark.parametrize("size", [8, 6], ids=["grouped", "loop"])
def test_bf16_autocast_multiplies_in_bf16_and_leaves_fp32_gradients(size: int) -> None:
    hidden, chosen, weights = routed(40, size, 4, 2)
    experts = experts_of(4, size, 8)
    exact = results(local_dispatch, hidden, chosen, weights, experts)
    with torch.autocast("cpu", torch.bfloat16):
        product = grouped_linear(torch.zeros(4, size), experts.gate_up_proj, torch.tensor([1, 1, 1, 1]))
        low = results(local_dispatch, hidden, chosen, weights, experts)
    assert product.dtype == torch.bfloat16
    assert low[0].dtype == torch.float32 and [grad.dtype for grad in low[1]] == [torch.float32] * 4
    for ours, theirs in zip([low[0], *low[1]], [exact[0], *exact[1]], strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert 1e-5 < error < 0.06


def test_bf16_weights_take_fp32_rows_under_autocast_and_bf16_rows_without() -> None:
    experts = experts_of(4, 8, 8).bfloat16()
    hidden, chosen, weights = routed(6, 8, 4, 2)
    out = local_dispatch(hidden.bfloat16(), chosen, weights, experts)
    assert out.dtype == weights.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = local_dispatch(hidden, chosen, weights, experts)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, out, atol=0.1, rtol=0.05)


def router_of(top: int, seed: int = 0) -> Router:
    router, generator = Router(8, 5, top, 1e-6), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


@pytest.mark.parametrize("top", [1, 2, 5])
def test_the_router_is_the_formula(top: int) -> None:
    router, hidden = router_of(top), routed(6, 8, 5, 1)[0].detach()
    chosen, weights = router(hidden)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * router.scale / 8**0.5
    scores = (normed @ router.proj.weight.T).softmax(-1)
    for token in range(6):
        best = sorted(range(5), key=lambda number: -scores[token, number])[:top]
        assert chosen[token].tolist() == best
        total = sum(scores[token, number] for number in best)
        expected = [scores[token, number] / total * router.per_expert_scale[number] for number in best]
        torch.testing.assert_close(weights[token], torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_the_router_scores_in_fp32_whatever_the_compute_dtype() -> None:
    """Two experts whose scores differ by less than bf16 tells: autocast must not choose by rounding."""
    router = Router(8, 2, 1, 1e-6)
    with torch.no_grad():
        router.proj.weight.copy_(torch.ones(2, 8) + torch.tensor([[0.0], [1e-4]]))
    hidden = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = router(hidden)
    assert (expected[0] == 1).all()
    with torch.autocast("cpu", torch.bfloat16):
        ours = router(hidden)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert ours[1].dtype == torch.float32
    low = copy.deepcopy(router).bfloat16()
    assert low(hidden.bfloat16())[1].dtype == torch.float32
