"""Law: where the experts are, with or without adapters on them, never changes what is learnt, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from unmask.distributed import expert_parallel
from unmask.models.diffusion_gemma.model import gelu
from unmask.models.experts import Experts, local_dispatch
from unmask.report.metrics import read_metrics

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`

Train = Callable[..., Any]
slow = pytest.mark.slow
ADAPTER = {
    "r": 2,
    "target_modules": ["*.q_proj"],
    "target_parameters": ["*.experts.gate_up_proj", "*.experts.down_proj"],
}


@pytest.fixture(scope="module")
def gemma_run(tiny, gemma_values: Callable[..., dict]) -> Callable[..., dict]:
    """Return a function that makes a run of a small DiffusionGemma with eight experts."""

    def make(root: Path, base: Path | None = None, **changes: Any) -> dict:
        text = {"vocab_size": 264, "num_experts": 8, "num_hidden_layers": 2, "pad_token_id": 257, "eos_token_id": 257,
                "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
        options = {
            "step_scheduler__global_batch_size": 4,
            "step_scheduler__local_batch_size": 1,
            "step_scheduler__max_steps": 2,
            "optimizer__lr": 1e-3,
            "dllm": {"mode": "block_diffusion", "self_conditioning_p": 0.5},
            "validation_dataset": tiny.validation(),
            **changes,
        }
        model = gemma_values(canvas_length=8, **text)
        values = tiny.config(root, **options)
        values["model"] = {"config": model} if base is None else {"pretrained_model_name_or_path": str(base)}
        return values

    return make


@pytest.fixture(scope="module")
def alone(gemma_run, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    train_tiny(gemma_run(root))
    return root


@pytest.fixture(scope="module")
def adapted_alone(gemma_run, alone: Path, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapted_alone")
    train_tiny(gemma_run(root, base=alone, peft=ADAPTER))
    return root


def assert_same(root: Path, reference: Path, file: str = "model.safetensors") -> None:
    for kind in ("train", "validation"):
        ours, theirs = (
            [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == kind]
            for folder in (root, reference)
        )
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            for field in ("loss", "grad_norm", "diffusion_loss", "encoder_loss"):
                if field in other:
                    assert one[field] == pytest.approx(other[field], rel=5e-5), (kind, field)
    first, second = (load_file(folder / "latest" / file) for folder in (root, reference))
    assert first.keys() == second.keys()
    for key, tensor in second.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=slow, id="gathered"),
        pytest.param({"ep_size": 2}, marks=slow, id="spread"),
        pytest.param({"ep_size": 2, "activation_checkpointing": True}, id="spread-checkpointed"),
        pytest.param({"reshard_after_forward": False}, marks=slow, id="gathered-kept"),
        pytest.param({"ep_size": 2, "reshard_after_forward": False}, marks=slow, id="spread-kept"),
    ],
)
def test_two_ranks_learn_what_one_does(gemma_run, alone: Path, run_ranks, tmp_path: Path, changes: dict) -> None:
    run_ranks(2, "train", gemma_run(tmp_path, **{f"distributed__{name}": value for name, value in changes.items()}))
    assert_same(tmp_path, alone)
    sizes = [
        (e["parameters"], e["trainable_parameters"])
        for root in (tmp_path, alone)
        for e in read_metrics(root / "metrics.jsonl")
        if e["event"] == "run"
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("size", [pytest.param(1, marks=slow, id="gathered"), pytest.param(2, id="spread")])
def test_adapters_on_experts(gemma_run, alone, adapted_alone: Path, run_ranks, tmp_path: Path, size: int) -> None:
    values = gemma_run(tmp_path, base=alone, peft=ADAPTER, distributed__ep_size=size, dllm__freeze_router=True)
    run_ranks(2, "train", values)
    assert_same(tmp_path, adapted_alone, "adapter_model.safetensors")


def test_a_checkpoint_goes_to_another_degree(gemma_run, alone: Path, train_tiny: Train, run_ranks, tmp_path) -> None:
    run_ranks(2, "train", gemma_run(tmp_path, distributed__ep_size=2, step_scheduler__max_steps=1))
    run_ranks(2, "train", gemma_run(tmp_path, distributed__ep_size=1))
    assert_same_steps(tmp_path, alone)


def assert_same_steps(root: Path, reference: Path) -> None:
    ours, theirs = (
        {e["step"]: e["loss"] for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "train"}
        for folder in (root, reference)
    )
    assert ours == pytest.approx(theirs, rel=5e-5)
    first, second = (load_file(folder / "latest" / "model.safetensors") for folder in (root, reference))
    for key, tensor in second.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=2e-4)


@slow
def test_the_recipes_options_together(gemma_run, alone: Path, run_ranks, tmp_path: Path) -> None:
    """Weights that travel in bf16, checkpointing and spread experts: the same loss, to bf16's precision.

    In bf16 a router near a tie chooses otherwise than in fp32, so gradients are held against gathered experts in bf16.
    """
    narrow = {"mp_policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "float32"}}
    spread = {"autocast_dtype": "bfloat16", "activation_checkpointing": True, "ep_size": 2, "defer_grad_sync": False}
    found = []
    for name, options in (("spread", {**narrow, **spread}), ("gathered", narrow)):
        run_ranks(2, "train", gemma_run(tmp_path / name, **{f"distributed__{k}": v for k, v in options.items()}))
        events = read_metrics(tmp_path / name / "metrics.jsonl")
        found.append([event for event in events if event["event"] == "train"])
    exact = [event for event in read_metrics(alone / "metrics.jsonl") if event["event"] == "train"]
    for one, other, reference in zip(*found, exact, strict=True):
        assert one["loss"] == pytest.approx(reference["loss"], rel=0.01)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.01)
    stored = load_file(tmp_path / "spread" / "latest" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


# For each rank, the two experts that each of its tokens goes to; experts 0 and 1 are on rank 0, 2 and 3 on rank 1.
CHOICES: dict[str, list[list[list[int]]]] = {
    "every rank gets rows": [[[0, 3], [2, 1]], [[3, 2], [0, 2], [2, 3]]],
    "one gets none": [[[0, 1], [1, 0]], [[1, 0], [0, 1], [1, 0]]],
    "one sends none": [[], [[2, 3], [0, 2]]],
    "all change places": [[[2, 3]], [[0, 1]]],
    "nothing anywhere": [[], []],
}


@pytest.mark.parametrize("width", [8, 6], ids=["grouped", "loop"])
def test_the_exchange_equals_experts_in_one_place(run_ranks: Callable[..., list], width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for chosen in CHOICES.values():
        experts = Experts(4, width, 4, gelu)
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        given = [
            (
                torch.randn(len(rows), width, generator=generator),
                torch.tensor(rows, dtype=torch.int64).view(-1, 2),
                torch.rand(len(rows), 2, generator=generator),
            )
            for rows in chosen
        ]
        cases.append((experts, given))
    both = run_ranks(2, "exchange", cases)
    for (name, chosen), (experts, given), *found in zip(CHOICES.items(), cases, *both, strict=True):
        goes = [[expert // 2 for rows in chosen for row in rows for expert in row].count(rank) for rank in (0, 1)]
        assert [each["rows"] for each in found] == goes, name
        hidden, indices, weights = (torch.cat(parts) for parts in zip(*given, strict=True))
        mixed = local_dispatch(hidden.requires_grad_(), indices, weights.requires_grad_(), experts)
        gradients = torch.autograd.grad(mixed.sin().sum(), [hidden, weights, *experts.parameters()])
        together = [torch.cat(parts) for parts in zip(*(each["tensors"] for each in found), strict=True)]
        for ours, theirs in zip(together, (mixed.detach(), *gradients), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def test_tokens_travel_in_the_dtype_that_experts_multiply_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the estimate counts them; and a token's gradients are summed as in one place, in its own dtype."""
    travelled: list[torch.dtype] = []

    def exchange(rows: Tensor, *_: Any) -> Tensor:
        travelled.append(rows.dtype)
        return rows

    monkeypatch.setattr(expert_parallel.dist, "get_world_size", lambda _: 1)
    monkeypatch.setattr(expert_parallel, "all_to_all_single", lambda counts, *_: counts)
    monkeypatch.setattr(expert_parallel, "all_to_all_single_autograd", exchange)
    monkeypatch.setattr(expert_parallel, "wait_tensor", lambda rows: rows)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(4, 16, 8, gelu)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(5, 16, generator=generator).requires_grad_()
    chosen, weights = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [2, 1]]), torch.rand(5, 2, generator=generator)
    found = []
    for dispatch in (local_dispatch, expert_parallel.expert_dispatch(None)):  # pyright: ignore[reportArgumentType]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = dispatch(hidden, chosen, weights, experts)
        found.append((mixed, *torch.autograd.grad(mixed.sin().sum(), [hidden, *experts.parameters()])))
    assert travelled == [torch.bfloat16] * 2
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_experts_in_place_are_as_before_after_an_exception() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        experts = Experts(4, 16, 8, gelu)
        expert_parallel.compute_in_place(experts, init_device_mesh("cpu", (1,)))
        for width in (16, 3):
            with nullcontext() if width == 16 else pytest.raises(RuntimeError):
                experts(torch.ones(4, width), torch.tensor([4, 0, 0, 0]))
            assert all(isinstance(parameter, DTensor) for parameter in experts.parameters())
    finally:
        dist.destroy_process_group()
