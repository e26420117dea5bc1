"""Calls recorded as graphs give what plain calls give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unmask.models.registry import load_model
from unmask.sampling.generate import generate
from unmask.sampling.replay import Replay, recordable
from unmask.sampling.settings import SamplerConfig

pytestmark = pytest.mark.gpu


def test_values_are_those_of_the_call_and_each_owner_has_its_own(cuda):
    replay, ran = Replay(enabled=True), []

    def function(scale):
        def run(values):
            ran.append(scale)
            return values * scale

        return run

    owners = [torch.full((1,), 2.0, device=cuda), torch.full((1,), 3.0, device=cuda)]
    for number in range(5):
        values = torch.arange(4.0, device=cuda) + number
        for owner in owners:
            assert torch.equal(replay(function(owner), (values,), owner), values * owner)
    assert len(ran) == 4  # each runs once, and once more to be recorded
    wider = torch.arange(8.0, device=cuda)
    assert torch.equal(replay(function(owners[0]), (wider,), owners[0]), wider * 2)


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_answers_are_those_of_plain_calls(fixtures: Path, cuda, monkeypatch, family, cache):
    if family == "diffusion_gemma" and cache is not None:
        cache = "block"
    folder = str(fixtures / ("llada_tiny" if family == "llada" else "diffusion_gemma_step"))
    model = load_model(folder, "bfloat16", cuda)
    assert recordable(model)
    sampler = (
        SamplerConfig(max_new_tokens=32, block_size=16, steps=32, cache=cache)
        if family == "llada"
        else SamplerConfig(steps=6, max_new_tokens=512, confidence_threshold=0.0, cache=cache)
    )
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [40, 41]]
    recorded = generate(model, prompts, sampler=sampler)
    monkeypatch.setattr(
        "unmask.sampling.replay.Replay.__call__", lambda self, function, inputs, *_, **__: function(*inputs)
    )
    plain = generate(model, prompts, sampler=sampler)
    assert [answer.token_ids for answer in recorded] == [answer.token_ids for answer in plain]
