"""Keyed randomness: a draw is a function of its key and of nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.rng import NoiseStream, generator, key

seeds = st.integers(-(2**70), 2**70)


def test_known_answers() -> None:
    """Pinned: other numbers here would silently change every run that is resumed."""
    assert key(42, "train/mask", 1, 7) == 0x2654A4D4AD0FF0DF5F28C814FF4B495D
    assert generator(42, "train/mask", 1, 7).random(2).tolist() == [0.4744788261635493, 0.7893210028528446]
    drawn = NoiseStream(42).uniform("mask", 1, torch.tensor([7, 8]), 3)
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert drawn.tolist() == [
        [0.01691383123397827, 0.4744787812232971, 0.29889029264450073],
        [0.5777187943458557, 0.6082513332366943, 0.4910961389541626],
    ]


@given(seed=seeds, epoch=st.integers(0, 2**40), sample=st.integers(0, 2**60))
def test_every_part_of_the_key_counts(seed: int, epoch: int, sample: int) -> None:
    name = (seed, "train/mask", epoch, sample)
    others = [
        (seed + 1, "train/mask", epoch, sample),
        (seed + 2**32, "train/mask", epoch, sample),  # torch's CPU generator would not see it
        (seed + 2**64, "train/mask", epoch, sample),
        (-seed - 1, "train/mask", epoch, sample),
        (seed, "train/masks", epoch, sample),
        (seed, "validation/mask", epoch, sample),
        (seed, "train/mask", epoch + 1, sample),
        (seed, "train/mask", epoch, sample + 2**32),
        (seed, "train/mask", epoch, sample + 1),
    ]
    keys = {key(*other) for other in [name, *others]}
    assert len(keys) == len(others) + 1
    assert all(0 <= value < 2**128 for value in keys)
    assert len({generator(*other).random() for other in [name, *others]}) == len(others) + 1


def test_no_two_names_run_together() -> None:
    assert key(1, "s", 11, 1) != key(1, "s", 1, 11) != key(11, "s", 1, 1)
    names = itertools.product(range(12), ("a", "a1", "1"), range(12), range(12))
    assert len({key(*name) for name in names}) == 12**3 * 3


@given(short=st.integers(0, 40), extra=st.integers(0, 40), samples=st.lists(st.integers(0, 99), max_size=4))
def test_a_short_draw_is_a_prefix_of_a_long_one(short: int, extra: int, samples: list[int]) -> None:
    stream, ids = NoiseStream(3), torch.tensor(samples, dtype=torch.int64)
    long = stream.uniform("mask", 2, ids, short + extra)
    assert long.shape == (len(samples), short + extra)
    assert torch.equal(stream.uniform("mask", 2, ids, short), long[:, :short])


@given(samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), seed=seeds)
def test_rows_do_not_know_each_other(samples: list[int], seed: int) -> None:
    stream = NoiseStream(seed)
    together = stream.uniform("time", 0, torch.tensor(samples), 5)
    for row, sample in zip(together, samples, strict=True):
        assert torch.equal(stream.uniform("time", 0, torch.tensor([sample]), 5)[0], row)
    assert ((together >= 0) & (together < 1)).all()


def test_global_generators_are_neither_used_nor_moved() -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # type: ignore[index, union-attr]
        drawn.append(NoiseStream(9).uniform("mask", 0, torch.arange(3), 7))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("scope", ["train", "validation"])
def test_draws_are_uniform_and_streams_uncorrelated(scope: str) -> None:
    ids = torch.arange(2000)
    rows = [
        NoiseStream(1, scope).uniform("time", 0, ids, 1)[:, 0],
        NoiseStream(1, scope).uniform("mask", 0, ids, 1)[:, 0],
        NoiseStream(1, scope).uniform("time", 1, ids, 1)[:, 0],
        NoiseStream(2, scope).uniform("time", 0, ids, 1)[:, 0],
        NoiseStream(1, "other").uniform("time", 0, ids, 1)[:, 0],
        NoiseStream(1, scope).uniform("time", 0, ids + 1, 1)[:, 0],
    ]
    grid = (torch.arange(2000) + 0.5) / 2000
    for row in rows:
        assert float((row.sort().values - grid).abs().max()) < 1.63 / 2000**0.5  # Kolmogorov–Smirnov at 1 %
    correlations = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert float(correlations.abs().max()) < 0.08
