"""Law: weights that travel in bf16 leave the residual stream as autocast alone has it, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.report.metrics import read_metrics

NARROW = {"param_dtype": "bfloat16"}


def losses(root: Path) -> list[tuple[float, float]]:
    events = read_metrics(root / "metrics.jsonl")
    return [(event["loss"], event["grad_norm"]) for event in events if event["event"] == "train"]


@pytest.mark.parametrize(
    "policy", [NARROW, pytest.param({**NARROW, "output_dtype": "bfloat16"}, marks=pytest.mark.slow)]
)
def test_the_residual_stream_is_fp32(tiny, train_tiny, run_ranks, tmp_path: Path, policy: dict[str, str]) -> None:
    common: dict[str, Any] = {"step_scheduler__max_steps": 3, "distributed__autocast_dtype": "bfloat16"}
    train_tiny(tiny.config(tmp_path / "alone", **common))
    values = tiny.config(tmp_path / "two", **common, distributed__mp_policy=policy)
    assert run_ranks(2, "train_noting_blocks", values) == [{"torch.float32"}] * 2
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "alone"), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
        assert ours[1] == pytest.approx(theirs[1], rel=2e-2)  # gradients of a network so small carry bf16's rounding


def test_so_is_that_of_encoder_and_decoder(tiny, gemma_values: Callable[..., dict], run_ranks, tmp_path: Path) -> None:
    text = {"vocab_size": 264, "num_hidden_layers": 2, "pad_token_id": 257, "eos_token_id": 257,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    values = tiny.config(
        tmp_path, step_scheduler__max_steps=1, dllm={"mode": "block_diffusion"}, distributed__mp_policy=NARROW
    )
    values["model"] = {"config": gemma_values(canvas_length=8, **text)}
    assert run_ranks(2, "train_noting_blocks", values) == [{"torch.float32"}] * 2
