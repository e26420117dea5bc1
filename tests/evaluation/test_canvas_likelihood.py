from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import unmask
from unmask import rng
from unmask.config.model import ModelConfig
from unmask.errors import ModelError, SamplingError
from unmask.evaluation.likelihood import content_key
from unmask.models.loading import build_model
from unmask.models.registry import plan_model

PROMPT, ANSWER = [3, 4, 5], [7, 9, 11, 13, 7, 9, 11, 13, 2, 6, 8]  # two canvases of 8, the second with 5 of fill


@pytest.fixture(scope="module")
def model(gemma_values):
    model = build_model(plan_model(ModelConfig(config=gemma_values())), None).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def test_the_encoder_likelihood_is_the_sum_over_its_next_tokens(model) -> None:
    ids = torch.tensor([PROMPT + ANSWER])
    chances = model.logits(model.encode(ids).hidden_BLD)[0].double().log_softmax(dim=-1)
    expected = sum(float(chances[len(PROMPT) + place - 1, token]) for place, token in enumerate(ANSWER))
    found = unmask.ar_log_likelihood(model, PROMPT, ANSWER)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-expected / len(ANSWER)), rel=1e-5)
    assert not found.greedy


@torch.no_grad()
def test_a_continuation_of_most_likely_tokens_is_greedy(model) -> None:
    ids = list(PROMPT)
    for _ in range(3):
        ids.append(int(model.logits(model.encode(torch.tensor([ids])).hidden_BLD)[0, -1].argmax()))
    assert unmask.ar_log_likelihood(model, PROMPT, ids[len(PROMPT) :]).greedy


@torch.no_grad()
def test_the_denoising_cross_entropy_is_that_of_its_answer_in_every_canvas(model) -> None:
    """Against whole logits of each canvas on its own, with the fill corrupted and not scored."""
    found = unmask.denoising_cross_entropy(model, PROMPT, ANSWER, num_samples=3, seed=5)
    filled = torch.tensor(ANSWER + [model.config.eos_token_id] * 5).view(2, 8)
    values = np.zeros(3)
    for canvas in range(2):
        encoded = model.encode(torch.tensor([PROMPT + ANSWER[: canvas * 8]]))
        for sample in range(3):
            draws = rng.generator(5, f"denoising/{content_key(PROMPT, ANSWER)}/{canvas}", 0, sample)
            level = (sample + draws.random()) / 3
            replaced = torch.from_numpy(draws.random(8) < level)
            noisy = torch.where(replaced, torch.from_numpy(draws.integers(0, 40, 8)), filled[canvas])
            chances = model.logits(model.decode(noisy[None], encoded))[0].double().log_softmax(dim=-1)
            scored = ANSWER[canvas * 8 : canvas * 8 + 8]
            values[sample] -= sum(float(chances[place, token]) for place, token in enumerate(scored))
    assert found.value == pytest.approx(values.mean() / len(ANSWER), rel=1e-5)
    assert (found.num_samples, found.tokens) == (3, len(ANSWER))


def test_the_batch_size_does_not_change_it(model) -> None:
    one, many = (unmask.denoising_cross_entropy(model, PROMPT, ANSWER, 6, batch_size=size) for size in (1, 12))
    assert one.value == pytest.approx(many.value, rel=1e-5)
    assert one.standard_error == pytest.approx(many.standard_error, rel=1e-4)


def test_the_reported_error_is_that_of_repeated_estimates(model) -> None:
    found = [unmask.denoising_cross_entropy(model, PROMPT, ANSWER[:4], 8, seed) for seed in range(60)]
    reported = math.sqrt(np.mean([each.standard_error**2 for each in found]))
    assert reported == pytest.approx(np.std([each.value for each in found], ddof=1), rel=0.25)


@pytest.mark.parametrize("function", [unmask.denoising_cross_entropy, unmask.ar_log_likelihood])
def test_what_cannot_be_scored_is_refused(model, opinionated, function) -> None:
    with pytest.raises(SamplingError, match="the prompt is empty"):
        function(model, [], ANSWER)
    with pytest.raises(SamplingError, match="the answer is empty"):
        function(model, PROMPT, [])
    with pytest.raises(ModelError, match=r"mask noise and bidirectional attention; use unmask\.log_likelihood"):
        function(opinionated, PROMPT, ANSWER)


def test_a_model_without_a_mask_is_pointed_to_its_own_numbers(model) -> None:
    with pytest.raises(ModelError, match=r"denoising_cross_entropy or unmask\.ar_log_likelihood"):
        unmask.log_likelihood(model, PROMPT, ANSWER)
