"""Token-exact with LLaDA's published sampler on the reference checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.config.sampler import SamplerConfig
from unmask.sampling.generate import generate

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "llada_tiny" / "expected.json").read_text())["generate"]


def prompts_of(reference, case: str) -> list[list[int]]:
    rows = reference["generate.prompt"].tolist()
    if case != "left_padded":
        return rows
    given = reference["generate.left_padded.attention_mask"].tolist()
    return [
        [token for token, keep in zip(row, kept, strict=True) if keep] for row, kept in zip(rows, given, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_published_sampler(reference_model, reference, case, batch_size):
    arguments = CASES[case]
    sampler = SamplerConfig(
        steps=arguments["steps"],
        max_new_tokens=arguments["gen_length"],
        block_size=arguments["block_length"],
        cfg_scale=arguments.get("cfg_scale", 0.0),
    )
    found = generate(reference_model, prompts_of(reference, case), sampler=sampler, batch_size=batch_size)
    expected = reference[f"generate.{case}.output"][:, reference["generate.prompt"].shape[1] :]
    assert [answer.token_ids for answer in found] == expected.tolist()
    assert [answer.stats.nfe for answer in found] == [arguments["steps"]] * len(found)
    assert all(answer.finish_reason == "length" for answer in found)


@pytest.mark.parametrize(("case", "threshold"), [("none.quota", None), ("none.threshold_0.3", 0.3)])
@pytest.mark.parametrize("both", [False, True])
def test_tokens_and_network_calls_equal_the_published_parallel_decoding(
    reference_model, reference, case, threshold, both
):
    sampler = SamplerConfig(steps=16, max_new_tokens=32, block_size=8, threshold=threshold)
    prompts = reference["generate.prompt"].tolist()
    # Beside a row of another pace, the first row's tokens and calls are still its own.
    found = generate(reference_model, prompts if both else prompts[:1], sampler=sampler)[0]
    assert found.token_ids == reference[f"{case}.output"][0, len(prompts[0]) :].tolist()
    assert found.stats.nfe == int(reference[f"{case}.nfe"])
