"""Law: how a global batch is divided, computed or stored never changes what is learnt, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Train = Callable[..., Any]


def final_weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "latest" / "model.safetensors")


def assert_close(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    assert list(one.losses) == list(other.losses)
    for step, loss in one.losses.items():
        assert other.losses[step] == pytest.approx(loss, rel=tolerance)
    # What is logged as the loss is not what is differentiated: a wrong divisor shows in the norm alone.
    norms = [[event["grad_norm"] for event in run.events if event["event"] == "train"] for run in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=100 * tolerance) and len(norms[0]) == len(one.losses)
    first, second = final_weights(one.root), final_weights(other.root)
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("supervise_padding", [False, True])
def test_one_times_four_is_four_times_one(
    tiny, train_tiny: Train, tmp_path: Path, normalization: str, supervise_padding: bool
) -> None:
    runs = [
        train_tiny(
            tiny.config(
                tmp_path / str(local),
                step_scheduler__local_batch_size=local,
                dllm__normalization=normalization,
                dllm__supervise_padding=supervise_padding,
                dllm__time_sampling="stratified",
                optimizer__lr=1e-3,
            )
        )
        for local in (1, 4)
    ]
    assert_close(*runs)


def test_activation_checkpointing_changes_nothing(tiny, train_tiny: Train, tmp_path: Path) -> None:
    runs = [
        train_tiny(tiny.config(tmp_path / str(on), distributed__activation_checkpointing=on)) for on in (False, True)
    ]
    assert_close(*runs, tolerance=1e-6)


def test_bf16_compute_keeps_fp32_weights_and_learns(tiny, train_tiny: Train, tmp_path: Path) -> None:
    changes = {
        "distributed__autocast_dtype": "bfloat16",
        "step_scheduler__max_steps": 60,
        "dllm__time_sampling": "stratified",
    }
    run = train_tiny(tiny.config(tmp_path, **changes))
    assert all(tensor.dtype == torch.float32 for tensor in final_weights(run.root).values())
    losses = list(run.losses.values())
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]


def test_logged_counts_are_those_of_the_global_batch(tiny, train_tiny: Train, tmp_path: Path) -> None:
    runs = [train_tiny(tiny.config(tmp_path / str(n), step_scheduler__local_batch_size=n)) for n in (1, 4)]
    counted = [[e["supervised_tokens"] for e in run.events if e["event"] == "train"] for run in runs]
    assert counted[0] == counted[1]
    padded = [[e["tokens"] for e in run.events if e["event"] == "train"] for run in runs]
    assert all(one <= four for one, four in zip(*padded, strict=True))
