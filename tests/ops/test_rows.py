"""Law: the gradients of taken rows have the same bits in every run, with two threads too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.ops.rows import in_order, inverse, take_rows

RUNS = 6
pytestmark = pytest.mark.usefixtures("two_threads")


def crowded(rows: int = 2000) -> tuple[Tensor, Tensor]:
    """Values of all sizes, and indices of which each occurs many times."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, 64, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    return values, torch.randint(0, 7, (rows,), generator=generator)


@pytest.mark.parametrize("shape", [(-1, 64), (-1,), (-1, 4, 16)], ids=str)
def test_rows_that_meet_are_added_in_the_same_order(shape: tuple[int, ...]) -> None:
    values, index = crowded()
    values = values.reshape(shape)
    index = index.repeat(len(values) // len(index))
    total = torch.zeros(9, *values.shape[1:], requires_grad=True)
    found = [torch.autograd.grad(take_rows(total, index), total, values)[0] for _ in range(RUNS)]
    assert all(torch.equal(found[0], again) for again in found[1:])
    exact = torch.zeros_like(total).double().index_add_(0, index, values.double())
    torch.testing.assert_close(found[0], exact.float(), rtol=1e-3, atol=1e-1)
    assert not found[0][7:].any()


@given(rows=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_an_inverse_undoes_a_permutation(rows: int, seed: int) -> None:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(inverse(order)[order], torch.arange(rows))
    assert torch.equal(order[inverse(order)], torch.arange(rows))


def test_copies_gradients_are_added_in_the_same_order() -> None:
    """As of tokens that go to several experts, in the order of the experts."""
    values = crowded()[0]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    rows = torch.zeros(len(values) // 8, 64, requires_grad=True)
    found = [torch.autograd.grad(in_order(rows, order, inverse(order), 8), rows, values)[0] for _ in range(RUNS)]
    assert all(torch.equal(found[0], again) for again in found[1:])


@given(rows=st.integers(0, 9), times=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_copies_in_order_are_rows_taken_in_values_and_gradients(rows: int, times: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows * times, generator=generator)
    taken = torch.randn(rows, 4, generator=generator).double().requires_grad_()
    probe = torch.randn(rows * times, 4, generator=generator).double()
    results = [in_order(taken, order, inverse(order), times), take_rows(taken, order // times)]
    assert torch.equal(*results)
    ours, theirs = (torch.autograd.grad(found, taken, probe)[0] for found in results)
    torch.testing.assert_close(ours, theirs)
