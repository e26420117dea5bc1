from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.sampling.engine.noise import quota
from unmask.sampling.settings import planned_calls


def quotas(sizes: list[int], steps: int) -> list[list[int]]:
    plan = zip(sizes, planned_calls(sizes, steps), strict=True)
    return [[quota(size, calls, step) for step in range(calls)] for size, calls in plan]


def test_steps_are_shared_over_blocks_with_the_remainder_first():
    assert quotas([8, 8, 4], 7) == [[3, 3, 2], [4, 4], [2, 2]]


def test_every_block_has_a_step_however_few_there_are():
    assert quotas([2, 2, 2, 2], 1) == [[2], [2], [2], [2]]


def test_steps_that_commit_nothing_are_left_out():
    assert quotas([2, 1], 100) == [[1, 1], [1]]


def test_blocks_with_nothing_open_have_no_calls_and_no_share_of_the_steps():
    assert planned_calls([0, 6, 0, 6, 0], 7) == (0, 4, 0, 3, 0)
    assert planned_calls([0, 0], 7) == (0, 0)


@given(steps=st.integers(1, 70), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9))
@settings(deadline=None, max_examples=100)
def test_quotas_fill_every_block_and_fall(steps, sizes):
    found = quotas(sizes, steps)
    assert [sum(block) for block in found] == sizes
    for block in filter(None, found):
        assert min(block) >= 1 and max(block) - min(block) <= 1 and block == sorted(block, reverse=True)
    assert sum(map(len, found)) <= max(steps, sum(size > 0 for size in sizes))


@pytest.mark.parametrize(("size", "calls"), [(5, 2), (4, 4), (7, 1)])
def test_calls_beyond_the_plan_still_commit_something(size, calls):
    assert all(quota(size, calls, step) >= 1 for step in range(calls, calls + 9))
