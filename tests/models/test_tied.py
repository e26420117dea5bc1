"""Law: an embedding's uses share one gradient, and it is the one that autograd adds up of theirs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmask.models.diffusion_gemma.signal import soft_embedding_of
from unmask.models.tied import Chain, look_up

VOCABULARY, WIDTH, CAP = 11, 4, 3.0


def embedding(padding_idx: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Embedding:
    generator = torch.Generator().manual_seed(0)
    made = nn.Embedding(VOCABULARY, WIDTH, padding_idx, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype))
    return made


def plain_signal(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = CAP * torch.tanh(hidden.detach() @ weight.detach().t() / CAP)
    return logits.softmax(dim=-1) @ weight


@given(
    uses=st.lists(st.one_of(st.lists(st.integers(0, VOCABULARY - 1), max_size=6), st.just("signal")), max_size=4),
    padding_idx=st.sampled_from([None, 0, 3]),
    head=st.booleans(),
)
@settings(max_examples=40)
def test_chained_uses_have_autograds_gradient(uses: list, padding_idx: int | None, head: bool) -> None:
    """Lookups and signals in any order, with or without a head after them."""
    source = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = embedding(padding_idx)

    def run(chain: Chain | None) -> Tensor:
        hidden = source
        for use in uses:
            if use == "signal":
                if chain is None:
                    found = plain_signal(source, table.weight)
                else:
                    found = chain.use(table, lambda weight: soft_embedding_of(source, weight, CAP))
            else:
                ids = torch.tensor(use, dtype=torch.int64)
                found = table(ids) if chain is None else chain.look_up(table, ids)
            hidden = torch.cat((hidden, found.sin()))
        if head:
            hidden = hidden @ (table.weight if chain is None else chain.weight(table)).t()
        return hidden.square().sum() + 0 * table.weight.sum()

    chain = Chain()
    with chain.open():
        ours = run(chain)
    theirs = run(None)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # the signal's sums are fp32
    gradients = [torch.autograd.grad(total, table.weight)[0] for total in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_only_one_gradient_as_large_as_the_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookups write to the tensor that the head's backward pass returned."""
    made: list[int] = []
    table, chain = embedding(), Chain()

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            return (hidden @ weight.t()).sum()

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            hidden, weight = ctx.saved_tensors
            dense = hidden.sum(dim=0).repeat(len(weight), 1)
            made.append(dense.data_ptr())  # the tensor itself, held here, could not be taken over
            return weight.sum(dim=0).expand_as(hidden), dense

    def refuse(*_, **__):
        raise AssertionError("a dense gradient was filled")

    with chain.open():
        hidden = chain.look_up(table, torch.tensor([1, 1, 4])) + chain.look_up(table, torch.tensor([1, 2, 3]))
        total = Head.apply(hidden, chain.weight(table))
    monkeypatch.setattr(torch, "zeros", refuse)
    total.backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert table.weight.grad is not None and [table.weight.grad.data_ptr()] == made


def test_outside_a_chain_every_use_has_the_weight_itself() -> None:
    table, chain = embedding(), Chain()
    assert chain.weight(table) is table.weight
    with chain.open():
        chain.look_up(table, torch.tensor([1]))
        assert chain.weight(table) is not table.weight
        with torch.no_grad():
            before = chain.weight(table)
            assert not chain.look_up(table, torch.tensor([1])).requires_grad
            assert chain.weight(table) is before
    assert chain.weight(table) is table.weight
    assert chain.look_up(table, torch.tensor([1])).grad_fn.name() == "EmbeddingBackward0"  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ZeroDivisionError), chain.open():
        chain.look_up(table, torch.tensor([1]))
        raise ZeroDivisionError
    assert chain.weight(table) is table.weight
    with chain.open():
        chain.look_up(table, torch.tensor([1]))
        with pytest.raises(RuntimeError, match="already"), chain.open():
            pass
        assert chain.weight(table) is not table.weight


def test_a_signals_gradient_may_come_back_as_one_number() -> None:
    """As that of a sum does, which is no memory to write to."""
    table, chain = embedding(), Chain()
    with chain.open():
        signal = chain.use(table, lambda weight: soft_embedding_of(table.weight[:2], weight, CAP))
        total = signal.sum() + chain.weight(table).sum()
    (ours,) = torch.autograd.grad(total, table.weight)
    expected = plain_signal(table.weight[:2], table.weight).sum() + table.weight.sum()
    torch.testing.assert_close(ours, torch.autograd.grad(expected, table.weight)[0], atol=1e-6, rtol=1e-6)


def test_a_frozen_weight_and_a_module_in_its_place_are_only_looked_up() -> None:
    """A subclass may do more in its forward pass, as an adapter does."""

    class Adapted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    frozen, adapted, ids = embedding().requires_grad_(False), Adapted(VOCABULARY, WIDTH), torch.tensor([2, 0])
    chain = Chain()
    with chain.open():
        assert not chain.look_up(frozen, ids).requires_grad
        assert chain.weight(frozen) is frozen.weight
        assert torch.equal(chain.look_up(adapted, ids), F.embedding(ids, adapted.weight) + 1)


def test_bf16_weights_get_bf16_gradients() -> None:
    table = embedding(dtype=torch.bfloat16)
    rows, weight = look_up(table.weight, torch.tensor([[1, 2], [2, 2]]), None)
    (gradient,) = torch.autograd.grad(rows.sum() + 2 * weight.sum(), table.weight)
    assert gradient.dtype == torch.bfloat16
    expected = torch.full((VOCABULARY, WIDTH), 2.0)
    expected[1] += 1
    expected[2] += 3
    torch.testing.assert_close(gradient.float(), expected)
