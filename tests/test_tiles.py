"""What is done with tiles of a large vocabulary: exp and tanh as CPUs are fast at, and parts of the positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.tiles import SMALL_CAP, cached_rows, exp_, tanh_, write_exp


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 6e-6), (torch.float64, 1e-13)])
def test_exp_is_exp(dtype: torch.dtype, error: float) -> None:
    """To the rounding of the exponent, which is largest where exp is; at the ends as exp itself."""
    numbers = torch.linspace(-80, 80, 10_001, dtype=dtype)
    torch.testing.assert_close(exp_(numbers.clone()).double(), numbers.double().exp(), rtol=error, atol=0)
    ends = torch.tensor([-torch.inf, 0.0, torch.inf, torch.nan, 1e30], dtype=dtype)
    torch.testing.assert_close(exp_(ends.clone()), ends.exp(), equal_nan=True, rtol=0, atol=0)


def test_exp_of_numbers_near_the_shift_keeps_its_digits() -> None:
    numbers_RN = 1e4 + torch.linspace(-5, 0, 6)[:, None].expand(6, 3)
    shift_N = torch.tensor([-1e4, -1e4 - 1, -1e4 - 2])
    found_RN = write_exp(torch.empty(6, 3), numbers_RN, shift_N)
    torch.testing.assert_close(found_RN, (numbers_RN + shift_N).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-7), (torch.float64, 4e-16)])
def test_tanh_under_a_small_cap_is_off_by_roundings_of_one(dtype: torch.dtype, error: float) -> None:
    numbers = torch.linspace(-30, 30, 100_001, dtype=dtype)
    torch.testing.assert_close(tanh_(numbers.clone(), 30.0).double(), numbers.double().tanh(), rtol=0, atol=error)


def test_tanh_under_a_large_cap_keeps_the_digits_of_small_numbers() -> None:
    numbers = torch.logspace(-12, 0, 100)
    torch.testing.assert_close(tanh_(numbers.clone(), 2 * SMALL_CAP), numbers.tanh(), rtol=1e-6, atol=0)


@given(positions=st.integers(0, 40), vocabulary=st.sampled_from([1, 2**17, 2**19, 2**20]))
def test_parts_cover_the_positions_in_order(positions: int, vocabulary: int) -> None:
    parts = cached_rows(torch.empty(1, 1).expand(positions, vocabulary))
    assert [index for part in parts for index in range(positions)[part]] == list(range(positions))
    assert all(len(range(positions)[part]) * vocabulary <= max(2**19, vocabulary) for part in parts)
