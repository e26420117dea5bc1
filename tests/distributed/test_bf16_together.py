"""Law: bf16 weights with fp32 masters learn the same on any number of ranks, and go from one number to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unmask.models.weights import read_tensors
from unmask.report.metrics import read_metrics

Train = Callable[..., Any]
slow = pytest.mark.slow


def settings(tiny, root: Path, steps: int, **changes: Any) -> dict:
    fixed = {"step_scheduler__global_batch_size": 8, "step_scheduler__max_steps": steps, "optimizer__lr": 1e-3,
             "model__torch_dtype": "bfloat16"}  # fmt: skip
    return tiny.config(root, **{**fixed, **changes})


def losses(root: Path) -> dict[int, tuple[float, float]]:
    events = read_metrics(root / "metrics.jsonl")
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events if e["event"] == "train"}


def state(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, masters and moments included."""
    return {**dict(read_tensors(root / "latest")), **dict(read_tensors(root / "latest" / "optimizer"))}


def assert_close(root: Path, reference: Path) -> None:
    """Gradients are made in bf16, of which the rounding is 2⁻⁹; a master moves by at most `lr` a step."""
    ours, theirs = losses(root), losses(reference)
    assert list(ours) == list(theirs) != []
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=0.02)
    first, second = state(root), state(reference)
    assert first.keys() == second.keys() and any(name.endswith("/master") for name in first)
    for name, tensor in second.items():
        if name.endswith("/master"):
            assert first[name].dtype == torch.float32
            assert float((first[name] - tensor).abs().mean()) < 2e-4
            assert torch.equal(first[name.removesuffix("/master")], first[name].bfloat16())


@pytest.fixture(scope="module")
def alone(tiny, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(settings(tiny, tmp_path_factory.mktemp("alone"), 4)).root


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"distributed__defer_grad_sync": False, "step_scheduler__local_batch_size": 1}, marks=slow),
        pytest.param({"distributed__dp_replicate_size": 2}, marks=slow),
    ],
    ids=["sharded", "summed-at-once", "replicated"],
)
def test_two_ranks_learn_what_one_does(tiny, alone: Path, run_ranks, tmp_path: Path, changes: dict) -> None:
    assert run_ranks(2, "train", settings(tiny, tmp_path, 4, **changes)) == ["finished", "finished"]
    assert_close(tmp_path, alone)


def test_masters_go_from_one_rank_to_two(tiny, train_tiny: Train, alone: Path, run_ranks, tmp_path: Path) -> None:
    train_tiny(settings(tiny, tmp_path, 2))
    run_ranks(2, "train", settings(tiny, tmp_path, 4))
    assert_close(tmp_path, alone)


@slow
@pytest.mark.parametrize("rounding", [False, True])
def test_as_many_ranks_as_before_is_exact(tiny, run_ranks, tmp_path: Path, rounding: bool) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, "train", settings(tiny, whole, 4, optimizer__stochastic_rounding=rounding))
    for steps in (2, 4):
        run_ranks(2, "train", settings(tiny, parts, steps, optimizer__stochastic_rounding=rounding))
    assert losses(parts) == losses(whole)
    ours, theirs = state(parts), state(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@slow
def test_copies_of_a_shard_round_alike(tiny, run_ranks, tmp_path: Path) -> None:
    changes = {"optimizer__stochastic_rounding": True, "checkpoint__enabled": False}
    values = settings(tiny, tmp_path / "copies", 3, distributed__dp_replicate_size=2, **changes)
    first, second = run_ranks(2, "measured_run", values)
    assert first["checksum"] == second["checksum"]


@slow
@pytest.mark.parametrize("modules", [["*.wte"], ["*.wte", "*norm", "*.ln_f"]])
def test_modules_trained_whole_beside_an_adapter(
    tiny, tiny_base: Path, train_tiny: Train, run_ranks, tmp_path: Path, modules: list[str]
) -> None:
    peft = {"r": 2, "modules_to_save": modules}
    base = {"pretrained_model_name_or_path": str(tiny_base), "torch_dtype": "bfloat16"}
    values = [{**settings(tiny, tmp_path / name, 3, peft=peft), "model": base} for name in ("alone", "together")]
    train_tiny(values[0])
    run_ranks(2, "train", values[1])
    for step, expected in losses(tmp_path / "alone").items():
        assert losses(tmp_path / "together")[step] == pytest.approx(expected, rel=0.02)
    one, other = (load_file(tmp_path / n / "latest" / "adapter_model.safetensors") for n in ("alone", "together"))
    assert {tensor.dtype for name, tensor in one.items() if "wte" in name} == {torch.bfloat16}
    for name, tensor in one.items():
        assert float((other[name].float() - tensor.float()).abs().mean()) < 3e-4, name
