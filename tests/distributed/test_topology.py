"""Law: the number of ranks, and how they share the model, never changes what is learnt, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unmask.report.metrics import read_metrics

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`

Train = Callable[..., Any]
slow = pytest.mark.slow
FIELDS = ("loss", "mdlm_loss", "grad_norm")


@pytest.fixture(scope="module")
def values(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return tiny.config(
        tmp_path_factory.mktemp("values") / "run",
        step_scheduler__global_batch_size=8,
        step_scheduler__max_steps=3,
        dllm__time_sampling="stratified",
        optimizer__lr=1e-3,
        validation_dataset=tiny.validation(),
    )


def placed(values: dict, root: Path, **changes: Any) -> dict:
    """Return the configuration in another run directory, with `section__field` changes."""
    new = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    new["checkpoint"] = {**new["checkpoint"], "checkpoint_dir": str(root)}
    for key, value in changes.items():
        section, name = key.split("__")
        new.setdefault(section, {})[name] = value
    return new


def events(root: Path, kind: str) -> list[dict]:
    return [event for event in read_metrics(root / "metrics.jsonl") if event["event"] == kind]


def assert_same(root: Path, reference: Path, tolerance: float = 2e-5) -> None:
    for kind in ("train", "validation"):
        ours, theirs = events(root, kind), events(reference, kind)
        assert [event["step"] for event in ours] == [event["step"] for event in theirs] != []
        for one, other in zip(ours, theirs, strict=True):
            for field in FIELDS:
                if field in one:
                    assert one[field] == pytest.approx(other[field], rel=tolerance), (kind, field)
            assert [one.get(name) for name in ("supervised_tokens", "lr")] == [
                other.get(name) for name in ("supervised_tokens", "lr")
            ]
    first, second = (load_file(folder / "latest" / "model.safetensors") for folder in (root, reference))
    assert first.keys() == second.keys()
    for key, tensor in second.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(values: dict, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    train_tiny(placed(values, root))
    return root


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step_scheduler__local_batch_size": 1, "distributed__activation_checkpointing": True},
        pytest.param({"step_scheduler__local_batch_size": 1, "distributed__defer_grad_sync": False}, marks=slow),
        pytest.param({"distributed__dp_replicate_size": 2}, marks=slow),
        {"step_scheduler__local_batch_size": 1, "distributed__reshard_after_forward": False},
    ],
    ids=["sharded", "accumulated-checkpointed", "summed-at-once", "replicated", "kept"],
)
def test_two_ranks_learn_what_one_does(values: dict, alone: Path, run_ranks, tmp_path: Path, changes: dict) -> None:
    assert run_ranks(2, "train", placed(values, tmp_path, **changes)) == ["finished", "finished"]
    assert_same(tmp_path, alone)
