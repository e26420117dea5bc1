from __future__ import annotations

import typing
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.config.sampler import RULE_SCORES, Remasking
from unmask.models.diffusion_gemma.family import FAMILY as DIFFUSION_GEMMA
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.engine import draws, rules
from unmask.sampling.settings import family_settings

MaskSettings = partial(family_settings, LLADA)
CanvasSettings = partial(family_settings, DIFFUSION_GEMMA, block_size=256)

OFF = -torch.inf


def test_ban_covers_tokens_and_padded_rows():
    assert rules.ban_(torch.zeros(2, 6), (1, 99), 4).tolist() == [[0, OFF, 0, 0, OFF, OFF]] * 2


def test_a_sample_without_temperature_is_argmax():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, OFF, 1.0]])
    assert rules.sample(logits, 0.0, None).tolist() == [1, 0]


@pytest.mark.parametrize("width", [40, 512, 1024, 1300])
def test_the_argmax_is_the_first_of_the_highest(width):
    numbers = torch.Generator().manual_seed(0)
    values = torch.randint(0, 3, (50, width), generator=numbers).float() - 3
    values[:, : width // 2] -= 3  # the highest values begin in the middle, and some rows have one only at the end
    values[::5] = -4.0
    values[::5, -1] = 1.0
    expected = [row.index(max(row)) for row in values.tolist()]
    assert rules.argmax(values).tolist() == expected
    assert rules.argmax(values.bfloat16()).tolist() == expected
    assert rules.argmax(torch.full((2, width), OFF)).tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_sample_is_of_the_tempered_softmax(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, OFF]).expand(20000, 4)
    chosen = rules.sample(logits, temperature, draws.gumbel(torch.arange(20000), 4))
    shares = chosen.bincount(minlength=4) / 20000
    assert (shares - (logits[0] / temperature).softmax(-1)).abs().max() < 0.015
    assert shares[3] == 0


def score_inputs(logits: torch.Tensor, uniform: torch.Tensor | None = None, first: int = 0) -> rules.ScoreInputs:
    logits = logits.float()
    total = logits.logsumexp(dim=-1)
    confidence = (rules.logit(logits, logits.argmax(-1)) - total).exp()
    return rules.ScoreInputs(logits, total, confidence, torch.arange(len(logits)) + first, uniform)


def test_scores_are_what_their_formulas_say():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, 7] = OFF
    exact = logits.double().softmax(-1)
    best = exact.sort(-1, descending=True).values
    uniform = torch.linspace(0, 1, 6, dtype=torch.float64)
    found = {name: score.measure(score_inputs(logits, uniform, 3)) for name, score in rules.SCORES.items()}
    expected = {
        "low_confidence": best[:, 0],
        "entropy": (exact * exact.clamp(min=1e-300).log()).sum(-1),
        "margin": best[:, 0] - best[:, 1],
        "random": uniform,
        "left_to_right": -torch.arange(3.0, 9.0),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values.double(), rtol=1e-5, atol=1e-6)


def test_scores_of_a_certain_position_are_the_highest_there_are():
    logits = torch.full((1, 5), OFF).index_fill(1, torch.tensor(2), 4.0)
    for name, value in (("low_confidence", 1.0), ("entropy", 0.0), ("margin", 1.0)):
        assert rules.SCORES[name].measure(score_inputs(logits)).tolist() == [value]
    assert rules.margin(score_inputs(torch.zeros(1, 1))).tolist() == [1.0]


def accept(rule: str, scores: list[float], active: list[int], quota: int = 1, **fields) -> list[int]:
    chosen = rules.RULES[rule](
        torch.tensor([scores]), torch.tensor([active]).bool(), torch.tensor([quota]), MaskSettings(**fields)
    )
    return chosen[0].nonzero()[:, 0].tolist()


def test_quota_takes_the_best_active_positions_only():
    assert accept("quota", [0.9, 0.1, 0.5, 0.7], [0, 1, 1, 1], quota=2) == [2, 3]


def test_ties_go_to_the_lowest_position():
    assert accept("quota", [0.5] * 40, [0] + [1] * 39, quota=3) == [1, 2, 3]
    assert accept("threshold", [0.5] * 40, [0, 0] + [1] * 38, threshold=0.9) == [2]


def test_a_deferred_position_is_taken_when_nothing_else_is_left():
    assert accept("quota", [OFF, 0.3, OFF, OFF], [0, 1, 1, 1], quota=2) == [1, 2]
    assert accept("threshold", [OFF, OFF, OFF], [0, 1, 1], threshold=0.0) == [1]


def test_threshold_takes_all_at_or_above_it_and_at_least_one():
    assert accept("threshold", [0.9, 0.5, 0.4, 0.6], [0, 1, 1, 1], threshold=0.5) == [1, 3]
    assert accept("threshold", [0.9, 0.5, 0.4, 0.6], [0, 1, 1, 1], threshold=0.8) == [3]
    assert accept("threshold", [0.9, 0.5, 0.4, 0.6], [0, 1, 1, 1], threshold=0.0) == [1, 2, 3]


def test_factor_takes_the_longest_run_of_sure_enough_positions_and_at_least_one():
    # With f = 1 the first of r positions must have at least 1/2, 2/3, 3/4, 4/5.
    assert accept("factor", [0.7, 0.9, 0.76, 0.4], [1, 1, 1, 1], factor=1.0) == [1, 2]
    assert accept("factor", [0.76, 0.9, 0.8, 0.4], [1, 1, 1, 1], factor=1.0) == [0, 1, 2]
    assert accept("factor", [0.7, 0.9, 0.1, 0.1], [1, 1, 1, 1], factor=1.0) == [0, 1]
    # The second fails though the third's bound, which is higher, cannot be met either: a run ends where it breaks.
    assert accept("factor", [0.9, 0.6, 0.6, 0.6], [1, 1, 1, 1], factor=1.0) == [0]
    assert accept("factor", [0.1, 0.4, 0.3, 0.2], [1, 1, 1, 1], factor=1.0) == [1]
    assert accept("factor", [0.99, 0.1, 0.3, OFF], [0, 1, 1, 1], factor=9.0) == [1, 2]
    assert accept("factor", [OFF, OFF], [0, 1], factor=0.0) == [1]


@given(
    scores=st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=1, max_size=12),
    factor=st.sampled_from([0.0, 0.25, 1.0, 3.0]),
)
@settings(deadline=None, max_examples=60)
def test_factor_equals_the_loop_that_defines_it(scores, factor):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    run = 0
    while run < len(order) and scores[order[run]] >= 1 - factor / (run + 2):
        run += 1
    assert accept("factor", scores, [1] * len(scores), factor=factor) == sorted(order[: max(run, 1)])


def test_an_entropy_rule_accepts_one_where_all_are_put_off():
    found = rules.RULES["entropy_bound"](
        torch.tensor([[OFF, OFF, OFF]]),
        torch.tensor([[False, True, True]]),
        torch.zeros(1),
        MaskSettings(remasking="entropy", entropy_bound=0.1),
    )
    assert found.tolist() == [[False, True, False]]


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


def test_every_rule_and_score_can_be_asked_for() -> None:
    """A setting that named no rule, or a score without a name, would be taken and ignored."""
    assert {"quota", *RULE_SCORES} == set(rules.RULES)
    assert set(typing.get_args(Remasking)) == set(rules.SCORES)
    assert all(set(scores) <= set(rules.SCORES) for scores in RULE_SCORES.values())
