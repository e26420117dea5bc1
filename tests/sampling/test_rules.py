from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.sampling import draws, rules
from unmask.sampling.settings import CanvasSettings, MaskSettings

OFF = -torch.inf


def test_ban_covers_tokens_and_padded_rows_and_leaves_its_input():
    logits = torch.zeros(2, 6)
    banned = rules.ban(logits, (1, 99), 4)
    assert banned.tolist() == [[0, OFF, 0, 0, OFF, OFF]] * 2
    assert logits.eq(0).all()


def test_choose_without_temperature_is_argmax():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, OFF, 1.0]])
    assert rules.choose(logits, 0.0, None).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choose_samples_the_tempered_softmax(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, OFF]).expand(20000, 4)
    chosen = rules.choose(logits, temperature, draws.gumbel(torch.arange(20000), 4))
    shares = chosen.bincount(minlength=4) / 20000
    assert (shares - (logits[0] / temperature).softmax(-1)).abs().max() < 0.015
    assert shares[3] == 0


def test_confidence_is_the_untempered_probability_in_fp32_even_for_bf16_logits():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = logits.argmax(-1)
    found = rules.confidence(logits, tokens, None)
    assert found.dtype == torch.float32
    exact = logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_random_order_is_the_number_that_was_drawn():
    uniform = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert rules.random_order(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), uniform).tolist() == [0.25, 0.75]


def settle(rule: str, scores: list[float], active: list[int], quota: int = 1, **fields) -> list[int]:
    chosen = rules.RULES[rule](
        torch.tensor([scores]), torch.tensor([active]).bool(), torch.tensor([quota]), MaskSettings(**fields)
    )
    return chosen[0].nonzero()[:, 0].tolist()


def test_quota_takes_the_best_active_positions_only():
    assert settle("quota", [0.9, 0.1, 0.5, 0.7], [0, 1, 1, 1], quota=2) == [2, 3]


def test_ties_go_to_the_lowest_position():
    assert settle("quota", [0.5] * 40, [0] + [1] * 39, quota=3) == [1, 2, 3]
    assert settle("threshold", [0.5] * 40, [0, 0] + [1] * 38, threshold=0.9) == [2]


def test_a_deferred_position_is_taken_when_nothing_else_is_left():
    assert settle("quota", [OFF, 0.3, OFF, OFF], [0, 1, 1, 1], quota=2) == [1, 2]
    assert settle("threshold", [OFF, OFF, OFF], [0, 1, 1], threshold=0.0) == [1]


def test_threshold_takes_all_at_or_above_it_and_at_least_one():
    assert settle("threshold", [0.9, 0.5, 0.4, 0.6], [0, 1, 1, 1], threshold=0.5) == [1, 3]
    assert settle("threshold", [0.9, 0.5, 0.4, 0.6], [0, 1, 1, 1], threshold=0.8) == [3]
    assert settle("threshold", [0.9, 0.5, 0.4, 0.6], [0, 1, 1, 1], threshold=0.0) == [1, 2, 3]


@given(data=st.data(), width=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_ranks_are_those_of_a_plain_sort(data, width):
    scores = data.draw(st.lists(st.sampled_from([OFF, 0.0, 0.25, 0.5, 1.0]), min_size=width, max_size=width))
    active = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
    order = sorted(range(width), key=lambda i: (not active[i], -scores[i], i))
    found = rules.ranks(torch.tensor([scores]), torch.tensor([active]))[0].tolist()
    places = [found[i] for i in order]
    assert places[: sum(active)] == list(range(sum(active)))
    assert sorted(found) == list(range(width))


@given(
    entropies=st.lists(st.integers(0, 300).map(lambda n: n / 1024), min_size=1, max_size=12),
    active=st.data(),
    bound=st.sampled_from([0.0, 0.1, 0.5]),
)
@settings(deadline=None, max_examples=60)
def test_positions_are_accepted_by_rising_entropy_while_those_before_are_within_the_bound(entropies, active, bound):
    width = len(entropies)
    is_active = active.draw(st.lists(st.booleans(), min_size=width, max_size=width))
    expected, before = [], 0.0
    for place in sorted((i for i in range(width) if is_active[i]), key=lambda i: entropies[i]):
        if before <= bound:
            expected.append(place)
        before += entropies[place]
    scores = torch.tensor([entropies]).neg().masked_fill(~torch.tensor([is_active]), OFF)
    found = rules.RULES["entropy_bound"](
        scores, torch.tensor([is_active]), torch.zeros(1), CanvasSettings(entropy_bound=bound)
    )
    assert found[0].nonzero()[:, 0].tolist() == sorted(expected)
    assert bool(found.any()) == any(is_active)
