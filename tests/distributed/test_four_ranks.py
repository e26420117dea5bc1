"""Four ranks: sharded, replicated, experts over two and four of them; killed at any moment, resumed on two. Slow."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unmask
from unmask.report.metrics import read_metrics
from unmask.training.checkpoint import checkpoints, verify

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GEMMA = {
    "vocab_size": 264, "num_experts": 8, "num_hidden_layers": 2, "pad_token_id": 257, "eos_token_id": 257,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

ADAPTER = {
    "r": 2,
    "target_modules": ["*.q_proj"],
    "target_parameters": ["*.experts.gate_up_proj", "*.experts.down_proj"],
}


def trained(root: Path) -> dict[int, tuple[float, float]]:
    events = read_metrics(root / "metrics.jsonl")
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events if e["event"] == "train"}


def assert_same(root: Path, reference: Path) -> None:
    ours, theirs = trained(root), trained(reference)
    assert list(ours) == list(theirs) != []
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=5e-5), step
    one, other = (unmask.load_model(str(folder)).state_dict() for folder in (root, reference))
    for key, tensor in other.items():
        torch.testing.assert_close(one[key], tensor, rtol=2e-3, atol=3e-4)


def run_of(tiny, root: Path, steps: int, **changes: Any) -> dict:
    return tiny.config(
        root,
        **{
            "step_scheduler__global_batch_size": 8,
            "step_scheduler__max_steps": steps,
            "step_scheduler__ckpt_every_steps": None,
            "optimizer__lr": 1e-3,
            "dllm__time_sampling": "stratified",
            **changes,
        },
    )


def gemma_run(tiny, gemma_values, root: Path, **changes: Any) -> dict:
    options = {"step_scheduler__local_batch_size": 1, "dllm": {"mode": "block_diffusion", "self_conditioning_p": 0.5}}
    values = run_of(tiny, root, 2, **options, **changes)
    if "dllm__time_sampling" in values:
        del values["dllm__time_sampling"]
    values["dllm"] = options["dllm"]
    return {**values, "model": {"config": gemma_values(canvas_length=8, **GEMMA)}}


@pytest.fixture(scope="module")
def alone(tiny, train_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    train_tiny(run_of(tiny, root, 4))
    return root


@pytest.fixture(scope="module")
def gemma_alone(tiny, gemma_values, train_tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gemma_alone")
    train_tiny(gemma_run(tiny, gemma_values, root))
    return root


@pytest.mark.parametrize("replicate", [1, 2, 4])
def test_four_ranks_learn_what_one_does(tiny, alone: Path, run_ranks, tmp_path: Path, replicate: int) -> None:
    run_ranks(4, "train", run_of(tiny, tmp_path, 4, distributed__dp_replicate_size=replicate), seconds=250)
    assert_same(tmp_path, alone)


@pytest.mark.parametrize(
    ("experts", "replicate", "options"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (4, 1, {}),
        (2, 2, {}),
        (2, 1, {"reshard_experts_after_forward": False}),
        (2, 1, {"reshard_experts_after_forward": False, "reshard_after_forward": False}),
    ],
)
def test_experts_on_four_ranks(
    tiny, gemma_values, gemma_alone: Path, run_ranks, tmp_path: Path, experts: int, replicate: int, options: dict
) -> None:
    options = {"ep_size": experts, "dp_replicate_size": replicate, **options}
    changes = {f"distributed__{name}": value for name, value in options.items()}
    run_ranks(4, "train", gemma_run(tiny, gemma_values, tmp_path, **changes), seconds=250)
    assert_same(tmp_path, gemma_alone)


def test_adapters_on_experts_on_four_ranks(
    tiny, gemma_values, gemma_alone: Path, train_tiny: Callable[..., Any], run_ranks, tmp_path: Path
) -> None:
    """With the same law on two ranks (test_expert_parallel): EP 1 = EP 2 = EP 4 with LoRA."""

    def adapted(root: Path, **changes: Any) -> dict:
        values = gemma_run(tiny, gemma_values, root, peft=ADAPTER, **changes)
        return {**values, "model": {"pretrained_model_name_or_path": str(gemma_alone)}}

    train_tiny(adapted(tmp_path / "alone"))
    run_ranks(4, "train", adapted(tmp_path / "shared", distributed__ep_size=4), seconds=250)
    assert trained(tmp_path / "shared") == {
        step: pytest.approx(values, rel=5e-5) for step, values in trained(tmp_path / "alone").items()
    }
    ours, theirs = (load_file(tmp_path / n / "latest" / "adapter_model.safetensors") for n in ("shared", "alone"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=2e-3, atol=3e-4)


def test_killed_on_four_resumed_on_two(tiny, alone: Path, start_ranks, run_ranks, tmp_path: Path) -> None:
    root = tmp_path / "run"
    values = run_of(tiny, root, 1000, step_scheduler__ckpt_every_steps=2)
    processes = start_ranks(tmp_path / "notes", 4, "train", values)
    while not (root / "step_2").exists():
        assert any(process.is_alive() for process in processes)
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    for folder in checkpoints(root)[:-1]:  # back to step 2, wherever the kill fell
        if folder.name != "step_2":
            folder.rename(tmp_path / folder.name)
    run_ranks(2, "train", run_of(tiny, root, 4), seconds=250)
    started = [event for event in read_metrics(root / "metrics.jsonl") if event["event"] == "run"][-1]
    assert started["resumed_from"] == "step_2"
    assert_same(root, alone)


def test_killed_at_ten_moments_never_torn_and_always_resumed(tiny, start_ranks, run_ranks, tmp_path: Path) -> None:
    """Every other kill falls into a save, the others anywhere."""
    root, dice, in_saves = tmp_path / "run", random.Random(7), 0
    values = run_of(tiny, root, 400, step_scheduler__ckpt_every_steps=1)
    for attempt in range(10):
        ranks = 4 if attempt in (2, 7) else 2
        before = len(trained(root)) if (root / "metrics.jsonl").exists() else 0
        processes = start_ranks(tmp_path / f"notes{attempt}", ranks, "train", values)
        until = time.monotonic() + 120
        while time.monotonic() < until and (not (root / "metrics.jsonl").exists() or len(trained(root)) <= before + 1):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.02)
        begun = f".step_*.{processes[0].pid}.part"
        while attempt % 2 and not list(root.glob(begun)):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05 if attempt % 2 else 0.6))
        for process in dice.sample(processes, ranks):
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        in_saves += bool(list(root.glob(begun)))
        for folder in checkpoints(root):
            verify(folder)
    assert in_saves >= 3
    reached = checkpoints(root)[0]
    last = int(reached.name.removeprefix("step_")) + 2
    run_ranks(2, "train", run_of(tiny, root, last), seconds=250)
    whole = tmp_path / "whole"
    run_ranks(2, "train", run_of(tiny, whole, last), seconds=250)
    ours, theirs = trained(root), trained(whole)
    assert list(ours) == list(theirs) == list(range(1, last + 1))
    assert not list(root.glob(".step_*"))
    # Two and four ranks round differently, and that grows over so many steps.
    assert ours[last] == pytest.approx(theirs[last], rel=0.05)
