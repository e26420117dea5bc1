from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.evaluation.interval import wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_it_is_the_published_interval(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(total=st.integers(1, 10_000), data=st.data())
def test_it_holds_the_share_and_stays_within_0_and_1(total: int, data) -> None:
    right = data.draw(st.integers(0, total))
    found = wilson(right, total)
    assert 0 <= found.low <= right / total <= found.high <= 1


def test_without_questions_nothing_is_known() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)


@pytest.mark.parametrize("right", [-1, 4])
def test_an_impossible_count_is_refused(right: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        wilson(right, 3)
