"""Corruption levels and masks as functions of their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.objectives.noise import absorb, mask_probability, stratified_time


@given(n=st.integers(1, 64), seed=st.integers(0, 999))
def test_each_slot_has_its_own_stratum(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws, slots = torch.rand(n, generator=generator), torch.randperm(n, generator=generator)
    time = stratified_time(draws, slots, n)
    assert time.dtype == torch.float32
    torch.testing.assert_close(time * n - slots, draws, atol=1e-4, rtol=0)
    assert ((time >= 0) & (time <= 1)).all()


def test_the_last_stratum_may_round_to_one_and_never_beyond() -> None:
    largest = torch.tensor([1 - 2**-24])
    for n in range(1, 300):
        time = stratified_time(largest, torch.tensor([n - 1]), n)
        assert 1 - 1 / n <= float(time) <= 1
        assert float(mask_probability(time, 1e-3)) <= 1


@pytest.mark.parametrize("eps", [1e-3, 0.2, 0.999])
def test_probability_runs_from_eps_to_one(eps: float) -> None:
    time = torch.linspace(0, 1, 11)
    p = mask_probability(time, eps)
    assert float(p[0]) == pytest.approx(eps) and float(p[-1]) == pytest.approx(1)
    torch.testing.assert_close(p.diff(), torch.full((10,), (1 - eps) / 10), atol=1e-6, rtol=0)


@given(st.integers(0, 999))
def test_absorb_touches_supervised_tokens_below_their_rows_probability_only(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (3, 8), generator=generator)
    supervised = torch.rand(3, 8, generator=generator) < 0.6
    p, draws = torch.rand(3, generator=generator), torch.rand(3, 8, generator=generator)
    before = ids.clone()
    noisy, masked = absorb(ids, supervised, p, draws, 99)
    assert torch.equal(ids, before)
    for row, place in np.ndindex(3, 8):
        expected = bool(supervised[row, place]) and float(draws[row, place]) < float(p[row])
        assert bool(masked[row, place]) == expected
        assert int(noisy[row, place]) == (99 if expected else int(ids[row, place]))


def test_probability_one_masks_everything_and_zero_nothing() -> None:
    ids, supervised = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    _, masked = absorb(ids, supervised, torch.tensor([1.0, 0.0]), torch.full((2, 5), 1 - 2**-24), 9)
    assert masked[0].all() and not masked[1].any()
    _, masked = absorb(ids, supervised, torch.tensor([1.0, 0.0]), torch.zeros(2, 5), 9)
    assert masked[0].all() and not masked[1].any()
