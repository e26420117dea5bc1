"""Law: a run that stops on some ranks and goes on with another number of them is the run that never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unmask
from unmask.cli import main
from unmask.models.folders import stored_tensors
from unmask.models.weights import read_tensors
from unmask.report.metrics import read_metrics

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`

Train = Callable[..., Any]
PART = "shard-00002-model-00001-of-00001.safetensors"
ADAPTER = {"r": 4, "target_modules": ["*.q_proj", "*.ff_out"]}


def settings(tiny, root: Path, steps: int, **changes: Any) -> dict:
    return tiny.config(
        root,
        step_scheduler__global_batch_size=4,
        step_scheduler__max_steps=steps,
        step_scheduler__ckpt_every_steps=1,
        checkpoint__save_consolidated=False,
        optimizer__lr=1e-3,
        **changes,
    )


def losses(root: Path) -> dict[int, tuple[float, float]]:
    events = read_metrics(root / "metrics.jsonl")
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events if e["event"] == "train"}


def assert_close(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs) != []
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=3e-5)


@pytest.fixture(scope="module")
def never_stopped(tiny, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("never_stopped")
    train_tiny(settings(tiny, root, 4))
    return root


@pytest.fixture(scope="module")
def two_ranks(tiny, run_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, "train", settings(tiny, root, 2))
    return root


def copied(root: Path, place: Path) -> Path:
    import shutil

    return shutil.copytree(root, place, symlinks=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return unmask.load_model(str(folder)).state_dict()


def test_two_ranks_then_one(tiny, train_tiny: Train, two_ranks: Path, never_stopped: Path, tmp_path: Path) -> None:
    root = copied(two_ranks, tmp_path / "run")
    run = train_tiny(settings(tiny, root, 4))
    assert "resuming from" in run.output and "step_2" in run.output
    assert_close(losses(root), losses(never_stopped))
    for key, tensor in weights(never_stopped).items():
        torch.testing.assert_close(weights(root)[key], tensor, rtol=1e-3, atol=1e-4)


def test_one_rank_then_two(tiny, train_tiny: Train, run_ranks, never_stopped: Path, tmp_path: Path) -> None:
    train_tiny(settings(tiny, tmp_path, 2))
    run_ranks(2, "train", settings(tiny, tmp_path, 4))
    assert_close(losses(tmp_path), losses(never_stopped))
    for key, tensor in weights(never_stopped).items():
        torch.testing.assert_close(weights(tmp_path)[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_as_many_ranks_as_before_is_exact(tiny, run_ranks, two_ranks: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", copied(two_ranks, tmp_path / "resumed")
    for root in (whole, resumed):
        run_ranks(2, "train", settings(tiny, root, 4))
    assert losses(resumed) == losses(whole)
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_a_torn_one_is_refused_and_the_one_before_used(tiny, run_ranks, two_ranks: Path, tmp_path: Path) -> None:
    root = copied(two_ranks, tmp_path / "run")
    shard = root / "step_2" / "sharded" / PART
    shard.write_bytes(shard.read_bytes()[:-1])
    run_ranks(2, "train", settings(tiny, root, 3))
    started = [event for event in read_metrics(root / "metrics.jsonl") if event["event"] == "run"][-1]
    assert started["resumed_from"] == "step_1" and f"step_2 is torn: sharded/{PART}" in started["refused"][0]
    assert list(losses(root)) == [1, 2, 3]


def test_shards_are_sampled_from_and_exported(two_ranks: Path, tmp_path: Path) -> None:
    assert not (two_ranks / "latest" / "model.safetensors").exists()
    assert main(["export", "--checkpoint", str(two_ranks), "--output", str(tmp_path / "plain")]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    shards = weights(two_ranks)
    assert plain.keys() == shards.keys() and all(torch.equal(plain[key], shards[key]) for key in plain)


def test_a_checkpoint_says_how_long_it_held_training_up(two_ranks: Path) -> None:
    saved = [event for event in read_metrics(two_ranks / "metrics.jsonl") if event["event"] == "checkpoint"]
    assert [event["folder"] for event in saved] == ["step_1", "step_2"]
    assert all(0 < event["pause_seconds"] <= event["seconds"] for event in saved)
    manifest = json.loads((two_ranks / "step_2" / "manifest.json").read_text())
    parts = {f"{folder}sharded/shard-0000{rank}-model-00001-of-00001.safetensors" for folder in ("", "optimizer/")
             for rank in (1, 2)}  # fmt: skip
    assert {path for path in manifest["files"] if path.endswith(".safetensors")} == parts


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint of several ranks holds, moments included."""
    return {**dict(read_tensors(folder)), **dict(read_tensors(folder / "optimizer"))}


def test_an_update_waits_for_the_copy_of_what_it_changes(tiny, run_ranks, two_ranks: Path, tmp_path: Path) -> None:
    run_ranks(2, "train_with_slow_copies", settings(tiny, tmp_path, 2), 0.5)
    for name in ("step_1", "step_2"):
        ours, theirs = saved(tmp_path / name), saved(two_ranks / name)
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    first = next(event for event in read_metrics(tmp_path / "metrics.jsonl") if event["event"] == "checkpoint")
    assert 0.1 < first["pause_seconds"] < first["seconds"]


def test_an_adapter_goes_from_two_ranks_to_one_and_back(
    tiny, tiny_base: Path, train_tiny: Train, run_ranks, tmp_path: Path
) -> None:
    def adapted(root: Path, steps: int) -> dict:
        values = settings(tiny, root, steps, peft=ADAPTER)
        return {**values, "model": {"pretrained_model_name_or_path": str(tiny_base)}}

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    train_tiny(adapted(alone, 3))
    run_ranks(2, "train", adapted(shared, 1))
    assert not {"model.safetensors", "config.json"} & {path.name for path in (shared / "step_1").iterdir()}
    assert all(".lora_" in name for name in stored_tensors(shared / "step_1" / "optimizer"))
    train_tiny(adapted(shared, 2))
    run_ranks(2, "train", adapted(shared, 3))
    assert_close(losses(shared), losses(alone))
    ours, theirs = (load_file(root / "latest" / "adapter_model.safetensors") for root in (shared, alone))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
