from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.ops.categorical import BLOCK, block_sums, categorical


@pytest.mark.parametrize("width", [5, BLOCK, BLOCK + 1, 3 * BLOCK - 7, 4 * BLOCK])
def test_a_token_is_where_the_cumulative_weight_passes_the_number(width):
    numbers = torch.Generator().manual_seed(width)
    weights = torch.rand(400, width, generator=numbers)
    weights[:, ::3] = 0
    uniform = torch.rand(400, generator=numbers, dtype=torch.float64)
    upto = weights.double().cumsum(dim=-1)
    expected = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True)[:, 0]
    found = categorical(weights, uniform)
    # fp32 sums of blocks move a boundary between neighbours by a millionth at most.
    assert (found != expected).sum() <= 1
    assert weights.gather(1, found[:, None]).min() > 0


@given(
    width=st.integers(1, 2 * BLOCK + 3),
    place=st.integers(0, 10**6),
    uniform=st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]),
)
@settings(deadline=None, max_examples=40)
def test_only_weight_is_drawn_whatever_the_number(width, place, uniform):
    weights = torch.zeros(1, width)
    weights[0, place % width] = 1e-30
    assert categorical(weights, torch.tensor([uniform], dtype=torch.float64)).item() == place % width


def test_frequencies_are_the_weights_over_a_long_vocabulary():
    weights = torch.full((1, 100_000), 1e-6)  # a tenth in a flat tail
    weights[0, [3, 50_000, 99_999]] = torch.tensor([0.5, 0.3, 0.1])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    found = torch.cat([categorical(weights.expand(len(part), -1), part) for part in uniform.split(1000)])
    for token, share in ((3, 0.5), (50_000, 0.3), (99_999, 0.1)):
        assert (found == token).double().mean() == pytest.approx(share, abs=2e-4)
    tail = found[~torch.isin(found, torch.tensor([3, 50_000, 99_999]))]
    assert len(tail.unique()) > 1900 and abs(tail.double().mean() / 50_000 - 1) < 0.05


def test_blocks_add_up_and_cover_the_rest():
    weights = torch.rand(3, 2 * BLOCK + 5)
    sums = block_sums(weights)
    assert sums.shape == (3, 3)
    torch.testing.assert_close(sums.sum(1), weights.sum(1))
    torch.testing.assert_close(sums[:, 2], weights[:, -5:].sum(1))
