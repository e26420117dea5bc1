from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.errors import ModelError, SamplingError
from unmask.evaluation import likelihood
from unmask.evaluation.likelihood import (
    LogLikelihood,
    _plan,
    log_likelihood,
    log_likelihoods,
    method_for,
    standard_error,
    stratified_counts,
)
from unmask.evaluation.measure import LIKELIHOODS
from unmask.models.registry import family_of

PROMPT, ANSWER = [1, 2, 3], [4, 9, 4, 30, 7]
DRAWS = 140


@pytest.fixture(scope="module")
def estimates(opinionated):
    """Estimates of 16 masks each, independent and in pairs."""
    return {
        pairs: [log_likelihood(opinionated, PROMPT, ANSWER, 16, seed, antithetic=pairs) for seed in range(DRAWS)]
        for pairs in (False, True)
    }


@pytest.mark.parametrize("pairs", [False, True])
def test_the_mean_of_many_estimates_is_the_sum_over_all_masks(estimates, exact_bound, pairs) -> None:
    values = np.array([float(each) for each in estimates[pairs]])
    assert abs(values.mean() - exact_bound(PROMPT, ANSWER)) < 3 * values.std(ddof=1) / math.sqrt(DRAWS)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_reported_error_is_that_of_repeated_estimates(estimates, pairs) -> None:
    spread = np.std([each.value for each in estimates[pairs]], ddof=1)
    reported = math.sqrt(np.mean([each.standard_error**2 for each in estimates[pairs]]))
    assert reported == pytest.approx(spread, rel=0.2)


def test_complementary_pairs_have_a_smaller_variance(estimates) -> None:
    independent, paired = (np.var([each.value for each in estimates[pairs]]) for pairs in (False, True))
    assert paired < 0.8 * independent


def test_an_answer_with_few_masks_is_summed_exactly(opinionated, exact_bound) -> None:
    found = log_likelihood(opinionated, PROMPT, ANSWER, 31, exact_if_cheaper=True)
    assert found.value == pytest.approx(exact_bound(PROMPT, ANSWER), rel=1e-5)
    assert (found.standard_error, found.num_samples) == (0.0, 31)
    drawn = log_likelihood(opinionated, PROMPT, ANSWER, 30, exact_if_cheaper=True)
    assert drawn.standard_error > 0 and drawn.num_samples == 30


def test_one_token_needs_one_sample(opinionated, exact_bound) -> None:
    found = log_likelihood(opinionated, PROMPT, [9])
    assert found.value == pytest.approx(exact_bound(PROMPT, [9]), rel=1e-5)
    assert (found.standard_error, found.num_samples) == (0.0, 1)


def test_an_answer_without_a_prompt_has_a_likelihood(opinionated, exact_bound) -> None:
    found = log_likelihood(opinionated, [], ANSWER, 31, exact_if_cheaper=True)
    assert found.value == pytest.approx(exact_bound([], ANSWER), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_neither_batch_size_nor_neighbours_change_an_estimate(opinionated, size) -> None:
    pairs = [(PROMPT, ANSWER), ([5], [6, 7]), ([1] * 20, list(range(8, 28)))]
    together = log_likelihoods(opinionated, pairs, 8, batch_size=size)
    for pair, found in zip(pairs, together, strict=True):
        alone = log_likelihood(opinionated, *pair, 8)
        assert found.value == pytest.approx(alone.value, rel=1e-5)
        assert found.standard_error == pytest.approx(alone.standard_error, rel=1e-3)


def test_the_same_call_gives_the_same_number_and_another_seed_another(opinionated) -> None:
    first = log_likelihood(opinionated, PROMPT, ANSWER, 8)
    assert log_likelihood(opinionated, PROMPT, ANSWER, 8) == first
    assert log_likelihood(opinionated, PROMPT, ANSWER, 8, seed=1) != first


def test_the_head_sees_masked_positions_only(opinionated, monkeypatch) -> None:
    seen = []
    whole = likelihood.cross_entropies
    monkeypatch.setattr(
        likelihood, "cross_entropies", lambda hidden, *others: seen.append(len(hidden)) or whole(hidden, *others)
    )
    log_likelihood(opinionated, [1] * 30, ANSWER, 31, exact_if_cheaper=True, batch_size=31)
    assert seen == [sum(math.comb(5, count) * count for count in range(1, 6))]


@given(answer=st.integers(1, 20), times=st.integers(1, 5), data=st.data())
def test_counts_are_spread_evenly(answer: int, times: int, data) -> None:
    where = data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=answer * times, max_size=answer * times))
    counts = np.bincount(stratified_counts(answer, np.array(where)), minlength=answer + 1)
    assert counts[0] == 0 and (np.abs(np.cumsum(counts) - times * np.arange(answer + 1)) <= 1).all()


@pytest.mark.parametrize(("top", "samples"), [(23, 16), (23, 64), (5, 128), (11.5, 8), (11, 8), (0.5, 3)])
def test_each_count_is_as_likely_as_its_share(top: float, samples: int) -> None:
    fine = (np.arange(2000) + 0.5) / 2000
    drawn = np.concatenate([stratified_counts(top, np.full(samples, at)) for at in fine])
    shares = np.bincount(drawn)[1:] / len(drawn)
    wanted = np.minimum(1, top - np.arange(math.ceil(top))) / top
    np.testing.assert_allclose(shares, wanted, atol=2e-3)


HARDNESS = np.random.default_rng(5).exponential(size=200)
# Cross-entropy of each token in a context in which a share of the tokens is masked.
SHAPES = {"smooth": lambda share: share**0.5, "steep": lambda share: share**4, "flat": lambda share: 0.5 + 0 * share}


def synthetic(answer: int, masks: int, pairs: bool, shape: str, draws: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return values and errors of many estimates for made-up cross-entropies, and their exact bound."""
    hard = HARDNESS[:answer]
    found = []
    for seed in range(draws):
        plan = _plan(0, [1], list(range(answer)), masks, seed, pairs, False)
        share_U = plan.masks_UA.mean(axis=1)
        found.append(plan.estimate((plan.masks_UA @ hard) * SHAPES[shape](share_U)))
    shares = np.arange(1, answer + 1) / answer
    exact = -float(hard.sum() * SHAPES[shape](shares).mean())
    return np.array([each.value for each in found]), np.array([each.standard_error for each in found]), exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("answer", "masks"), [(40, 16), (41, 16), (96, 32), (12, 48)])
def test_errors_are_honest_also_with_fewer_masks_than_tokens(answer, masks, pairs, shape) -> None:
    values, errors, exact = synthetic(answer, masks, pairs, shape, 100)
    spread = values.std(ddof=1)
    assert abs(values.mean() - exact) < 3.5 * spread / math.sqrt(len(values)) + 1e-9
    reported = math.sqrt(np.mean(errors**2))
    assert reported > 0.85 * spread
    # Differences between strata may only add to it.
    assert np.median(errors) > 0.6 * spread


@given(answer=st.integers(2, 9), draws=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_full_mask_of_pairs_counts_once_in_as_many_as_there_are_tokens(answer: int, draws: int) -> None:
    plan = _plan(0, [1], list(range(answer)), 6, draws, True, False)
    assert plan.sample_S is not None
    masks_SA = plan.masks_UA[plan.sample_S]
    assert masks_SA[-1].all() and not masks_SA[:-1].all(axis=1).any()
    assert (masks_SA[0:-1:2] ^ masks_SA[1:-1:2]).all()
    full = plan.masks_UA.all(axis=1)
    assert plan.estimate(np.where(full, 1.0, 0.0)).value == pytest.approx(-1 / answer)
    assert plan.estimate(plan.masks_UA.sum(axis=1).astype(float)).value == pytest.approx(-answer)


def test_a_single_sample_says_nothing_of_its_error(opinionated) -> None:
    assert math.isnan(log_likelihood(opinionated, PROMPT, ANSWER, 1).standard_error)
    assert math.isnan(standard_error(np.ones(1)))


def test_the_value_is_never_above_zero(opinionated) -> None:
    found = log_likelihood(opinionated, PROMPT, ANSWER, 4)
    assert found.value <= 0 and isinstance(found, LogLikelihood) and float(found) == found.value


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((PROMPT, []), {}, "answer 0 is empty"),
        ((PROMPT, ANSWER, 0), {}, "num_samples: must be at least 1"),
        ((PROMPT, ANSWER, 7), {"antithetic": True}, "must be even"),
        ((PROMPT, ANSWER), {"batch_size": 0}, "batch_size: must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(opinionated, arguments, options, said) -> None:
    with pytest.raises(SamplingError, match=said):
        unmask.log_likelihood(opinionated, *arguments, **options)


def test_noise_and_attention_without_a_likelihood_are_refused_by_name(opinionated, monkeypatch) -> None:
    family = replace(family_of(opinionated.config), attention="block_causal")
    monkeypatch.setattr("unmask.evaluation.likelihood.family_of", lambda config: family)
    said = "LLaDA has mask noise and block_causal attention"
    with pytest.raises(ModelError, match=f"log_likelihood: it needs mask noise .*, and {said}"):
        unmask.log_likelihood(opinionated, PROMPT, ANSWER)
    with pytest.raises(ModelError, match=rf"--tasks likelihood: .*{said}; leave the task out"):
        method_for(LIKELIHOODS, opinionated, "--tasks likelihood", "leave the task out")
    with pytest.raises(ModelError, match="Linear is of no known family"):
        unmask.log_likelihood(torch.nn.Linear(1, 1), PROMPT, ANSWER)
