"""Law: a rank without rows of its own helps the others, and what they answer and measure is what one process does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import main
from unmask.report.metrics import read_metrics

TEXT = {"vocab_size": 264, "num_experts": 8, "num_hidden_layers": 2, "pad_token_id": 257, "eos_token_id": 257,
        "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_prompt_is_answered_by_all(tiny_base: Path, run_ranks, tmp_path: Path, ranks: int) -> None:
    flags = ["--prompt", "so?", "--max_new_tokens", "8", "--block_size", "4", "--device", "cpu", "--output"]
    words = ["generate", "--checkpoint", str(tiny_base), *flags]
    assert main([*words, str(tmp_path / "one.jsonl")]) == 0
    assert run_ranks(ranks, "command", [*words, str(tmp_path / "all.jsonl"), "--shard"]) == [0] * ranks
    found = [json.loads((tmp_path / name).read_text()) for name in ("one.jsonl", "all.jsonl")]
    for record in found:
        del record["tokens_per_second"]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("ranks", "experts"),
    [(2, 2), pytest.param(4, 4, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_one_question_is_answered_by_experts_on_all(
    tiny, gemma_values: Callable[..., dict], train_tiny, run_ranks, tmp_path: Path, ranks: int, experts: int
) -> None:
    """A helping pass has one token, of which the experts of most ranks see nothing."""

    def values(name: str, **changes: Any) -> dict:
        options = {
            "step_scheduler__global_batch_size": 4, "step_scheduler__local_batch_size": 1,
            "step_scheduler__max_steps": 1, "optimizer__lr": 1e-3,
            "dllm": {"mode": "block_diffusion", "self_conditioning_p": 0.5},
            "validation_dataset": tiny.validation(max_samples=1),
            "validation": {"generate_every_steps": 1, "max_samples": 1, "keep_samples": 1,
                           "sampler": {"steps": 3, "max_new_tokens": 16}},
        }  # fmt: skip
        found = tiny.config(tmp_path / name, **{**options, **changes})
        return {**found, "model": {"config": gemma_values(canvas_length=8, **TEXT)}}

    train_tiny(values("alone"))
    assert run_ranks(ranks, "train", values("shared", distributed__ep_size=experts)) == ["finished"] * ranks
    events = {}
    for name in ("alone", "shared"):
        logged = read_metrics(tmp_path / name / "metrics.jsonl")
        events[name] = {event["event"]: event for event in logged}
        events[name]["sample"] = json.loads((tmp_path / name / "samples.jsonl").read_text())
    ours, theirs = events["shared"], events["alone"]
    assert ours["validation"]["loss"] == pytest.approx(theirs["validation"]["loss"], rel=1e-4)
    assert ours["exact_match"]["total"] == theirs["exact_match"]["total"] == 1
    assert ours["sample"] == theirs["sample"]
