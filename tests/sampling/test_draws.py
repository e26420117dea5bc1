from __future__ import annotations

import math

import torch

from unmask.sampling.engine import draws
from unmask.sampling.engine.state import Positions


def positions(call: int) -> Positions:
    key, at, nothing = torch.full((30000,), 7), torch.arange(30000), torch.zeros(30000, dtype=torch.long)
    return Positions(key, nothing + call, at, nothing, nothing)


def splitmix64(state: int, count: int) -> list[int]:
    """The published algorithm in Python's integers."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_numbers_are_those_of_splitmix64():
    seeds = [1234567, -5, 2**62]
    expected = [[((z >> 12) + 0.5) * 2.0**-52 for z in splitmix64(seed % 2**64, 50)] for seed in seeds]
    assert torch.equal(draws.uniform(torch.tensor(seeds), 50), torch.tensor(expected, dtype=torch.float64))
    # First output for seed 1234567 in the algorithm's public test vectors.
    assert splitmix64(1234567, 1) == [6457827717110365317]


def test_uniform_is_uniform_and_open():
    numbers = draws.uniform(torch.arange(100), 1000)
    assert 0 < numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.002
    # Neighbouring keys and neighbouring numbers are not related.
    centred = numbers - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 0.02
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() * 12) < 0.02


def test_gumbel_has_its_moments():
    noise = draws.gumbel(torch.arange(100), 1000)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2 / 6) < 0.05


def test_each_part_of_a_key_matters_and_its_place_in_the_batch_does_not():
    row, call, column = (torch.tensor(values) for values in ([7, 8, 7, 7], [0, 0, 1, 0], [3, 3, 3, 4]))
    four = Positions(row, call, column, call, call)
    keys = draws.position_keys(four, draws.TOKENS)
    assert len(set(keys.tolist())) == 4
    assert not set(keys.tolist()) & set(draws.position_keys(four, draws.ORDER).tolist())
    assert torch.equal(draws.position_keys(four[2:], draws.TOKENS), keys[2:])
    assert row.tolist() == [7, 8, 7, 7]


def test_row_keys_follow_the_prompt_not_its_neighbours():
    alone = draws.row_keys(0, [[1, 2]])
    among = draws.row_keys(0, [[3], [1, 2], [1, 2], [1], [2]])
    assert among[1] == alone[0]
    assert len(set(among)) == 5
    assert draws.row_keys(1, [[1, 2]]) != alone
    # Equal modulo 2^32, where torch's own CPU generator would not tell them apart.
    assert draws.row_keys(2**32, [[1, 2]]) != alone


def test_noise_is_uniform_over_the_vocabulary_and_new_in_every_call():
    places = positions(call=0)
    noise = draws.KeyedDraws().noise(places, 10)
    assert noise.min() == 0 and noise.max() == 9
    assert (noise.bincount() / 30000 - 0.1).abs().max() < 0.01
    later = draws.KeyedDraws().noise(positions(call=1), 10)
    assert abs((noise == later).float().mean() - 0.1) < 0.01
    assert torch.equal(draws.KeyedDraws().noise(places[5:9], 10), noise[5:9])


def test_a_category_does_not_depend_on_the_noise_of_its_call():
    places = positions(call=0)
    source = draws.KeyedDraws()
    drawn, noise = source.category(places, torch.ones(30000, 10)), source.noise(places, 10)
    assert abs((drawn == noise).float().mean() - 0.1) < 0.01
