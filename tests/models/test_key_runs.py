"""Rows that attend in runs of like length, against all of them under one mask."""

from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from unmask.models import key_runs as key_runs_module
from unmask.models.attention import attend
from unmask.models.key_runs import key_runs


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=20))
def test_runs_cover_the_rows_in_order(lengths: list[int]) -> None:
    runs = key_runs(lengths)
    assert [row for run in runs for row in range(len(lengths))[run.rows]] == list(range(len(lengths)))
    for run in runs:
        own = lengths[run.rows]
        assert run.keys == max(own)
        allowed = [run.keys] * len(own) if run.mask is None else run.mask.flatten(1).sum(dim=1).tolist()
        assert allowed == own


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_no_other_runs_cost_less(lengths: list[int]) -> None:
    def cost(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(lengths)]
        return sum((b - a) * max(lengths[a:b]) + key_runs_module._CALL for a, b in pairwise(bounds))

    places = range(1, len(lengths))
    least = min(cost(cuts) for number in range(len(lengths)) for cuts in combinations(places, number))
    found = key_runs(lengths)
    assert cost(tuple(run.rows.start for run in found[1:])) == least


def test_like_lengths_stay_together_and_unlike_ones_are_parted() -> None:
    assert [run.rows for run in key_runs([500] * 16)] == [slice(0, 16)]
    assert [run.rows for run in key_runs([100, 110, 120])] == [slice(0, 3)]
    assert [run.rows for run in key_runs([40, 50, 1000, 1000])] == [slice(0, 2), slice(2, 4)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_attending_in_runs_is_attending_under_the_mask(heads: tuple[int, int], lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = heads
    columns = max(lengths) + 3  # a store may be wider than its rows
    q_BHLE = torch.randn(len(lengths), queries, 5, 8, generator=generator)
    k_BGLE, v_BGLE = torch.randn(2, len(lengths), keys, columns, 8, generator=generator)
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None])[:, None, None]
    theirs = F.scaled_dot_product_attention(q_BHLE, k_BGLE, v_BGLE, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend(q_BHLE, k_BGLE, v_BGLE, key_runs(lengths)), theirs, atol=2e-6, rtol=1e-5)
