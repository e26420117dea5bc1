"""What a dry run says a rank will hold and receive, against what ranks hold and receive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.cli import main
from unmask.config import config_from_mapping
from unmask.config.distributed import DistributedConfig
from unmask.distributed.processes import Degrees, resolve_degrees
from unmask.errors import ConfigError
from unmask.models.loading import empty_network
from unmask.prepare import prepare
from unmask.training.estimate import SharedEstimate, estimate_memory, estimate_shared
from unmask.training.needs import count_needs


def counted(values: dict, processes: int) -> SharedEstimate:
    prepared = prepare(config_from_mapping(values), processes=processes)
    with torch.device("meta"):
        model = empty_network(prepared.plan.family, prepared.plan.config)
        model = model.to(getattr(torch, prepared.config.model.torch_dtype))
    whole = estimate_memory(prepared.config, prepared.plan, model)
    return estimate_shared(prepared.config, prepared.plan, model, whole, prepared.degrees)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"distributed__defer_grad_sync": False}, marks=pytest.mark.slow),
        pytest.param({"distributed__dp_replicate_size": 2}, marks=pytest.mark.slow),
        pytest.param({"distributed__mp_policy": {"param_dtype": "bfloat16"}}, marks=pytest.mark.slow),
        pytest.param({"distributed__reshard_after_forward": False}, marks=pytest.mark.slow),
        {"model__torch_dtype": "bfloat16"},
        pytest.param(
            {"model__torch_dtype": "bfloat16", "optimizer__stochastic_rounding": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["deferred", "at-once", "replicated", "bf16", "kept", "bf16 weights", "rounded"],
)
def test_two_ranks_hold_and_receive_what_was_counted(tiny, run_ranks, tmp_path: Path, changes: dict) -> None:
    values = tiny.config(
        tmp_path / "run", step_scheduler__global_batch_size=8, step_scheduler__local_batch_size=2,
        step_scheduler__max_steps=1, checkpoint__enabled=False, **changes,
    )  # fmt: skip
    expected = counted(values, 2)
    for measured in run_ranks(2, "measured_run", values):
        assert measured["shard"] == pytest.approx(expected.weights, rel=0.01)
        assert measured["optimizer"] == pytest.approx(expected.optimizer, rel=0.01)
        assert measured["weights"] == pytest.approx(expected.weights_received, rel=0.03)
        assert measured["gradients"] == pytest.approx(expected.gradients_received, rel=0.03)
        if expected.weights_received:  # of one rank alone nothing is gathered, though FSDP2 takes the buffers
            assert measured["buffer"] == pytest.approx(expected.buffers, rel=0.05)


@pytest.mark.parametrize("reshards", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_experts_exchange_what_was_counted(
    tiny, gemma_values: Callable[..., dict], run_ranks, tmp_path: Path, reshards: bool
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 264, "num_experts": 8, "num_hidden_layers": 2, "hidden_size": 32,
                             "layer_types": ["sliding_attention", "full_attention"],
                             "pad_token_id": 257, "eos_token_id": 257}  # fmt: skip
    values = tiny.config(
        tmp_path / "run", step_scheduler__global_batch_size=8, step_scheduler__local_batch_size=4,
        step_scheduler__max_steps=1, checkpoint__enabled=False, distributed__ep_size=2,
        distributed__reshard_after_forward=reshards,
        dllm={"mode": "block_diffusion", "self_conditioning_p": 1.0},
    )  # fmt: skip
    values["model"] = {"config": gemma_values(canvas_length=16, **sizes)}
    expected = counted(values, 2)
    for measured in run_ranks(2, "measured_run", values):
        assert measured["shard"] == pytest.approx(expected.weights, rel=0.01)
        assert measured["weights"] == pytest.approx(expected.weights_received, rel=0.05)
        assert measured["gradients"] == pytest.approx(expected.gradients_received, rel=0.05)
        assert measured["buffer"] == pytest.approx(expected.buffers, rel=0.05)
        # Rows are shorter than seq_length, for which the count is made, and gradients are not seen by this measurement.
        assert 0.05 * expected.tokens_received < measured["tokens"] < expected.tokens_received


def test_experts_in_place_have_no_second_gradient(tiny, gemma_values: Callable[..., dict], tmp_path: Path) -> None:
    """FSDP2 keeps whole gradients until the last micro-batch beside their shards; these are their shards."""
    values = tiny.config(
        tmp_path / "run", step_scheduler__global_batch_size=8, step_scheduler__local_batch_size=2,
        distributed__ep_size=2, dllm={"mode": "block_diffusion"},
    )  # fmt: skip
    text = {"vocab_size": 264, "num_experts": 8, "pad_token_id": 257, "eos_token_id": 257}
    values["model"] = {"config": gemma_values(canvas_length=16, **text)}
    in_place = counted(values, 2)
    values["distributed"] |= {"mp_policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}}
    copied = counted(values, 2)
    prepared = prepare(config_from_mapping(values), processes=2)
    with torch.device("meta"):
        model = empty_network(prepared.plan.family, prepared.plan.config)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert copied.gradients - in_place.gradients == experts // 2 > 0


def test_the_files_of_ranks_are_counted_as_they_are_put_together(tiny, run_ranks, tmp_path: Path) -> None:
    """In memory, twice: safetensors makes a file of bytes that it has copied."""
    values = tiny.config(tmp_path / "run", step_scheduler__global_batch_size=8, step_scheduler__max_steps=1)
    prepared = prepare(config_from_mapping(values), processes=2)
    with torch.device("meta"):
        model = empty_network(prepared.plan.family, prepared.plan.config)
    config, plan, device = prepared.config, prepared.plan, torch.device("cpu")
    whole = estimate_memory(config, plan, model)
    shared = estimate_shared(config, plan, model, whole, prepared.degrees)
    needs = count_needs(config, plan, model, whole, shared, prepared.degrees, device, 1)
    assert needs.host >= needs.program + needs.training + needs.writing
    run_ranks(2, "train", values)
    files = list((tmp_path / "run" / "latest" / "optimizer" / "sharded").iterdir())
    assert len(files) == 2 and needs.writing / 2 < 2 * sum(file.stat().st_size for file in files) <= needs.writing


def test_a_dry_run_shows_the_share_of_a_process(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", step_scheduler__global_batch_size=8))
    words = ["train", "-c", str(path), "--dry-run", "--nproc-per-node", "4", "--distributed.dp_replicate_size", "2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "4 = 2 copies × 2 that share one" in shown and "a process holds" in shown and "and receives" in shown
    assert "8 rows = 2 rows × 4 micro-batches on 4 processes" in shown.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "world", "experts", "said"),
    [
        ({"dp_size": 2}, 4, None, "distributed.dp_size: 2, but this run has 4 processes"),
        ({"dp_replicate_size": 3}, 4, None, "dp_replicate_size: 3 does not divide"),
        ({"ep_size": 2}, 4, None, "the model has no experts"),
        ({"ep_size": 3}, 3, 8, "does not divide the model's 8 experts"),
        ({"ep_size": 4, "dp_replicate_size": 2}, 4, 8, "does not divide the 2 ranks that share one copy"),
        ({"ep_size": 8}, 1, 8, "does not divide the 1 ranks"),
        ({"offload_policy": "cpu"}, 1, None, "needs more than one process"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(section: dict, world: int, experts: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_degrees(DistributedConfig(**section), world, experts)


def test_degrees_multiply_to_the_world() -> None:
    degrees = resolve_degrees(DistributedConfig(dp_replicate_size=2, ep_size=2, dp_size=8), 8, 4)
    assert degrees == Degrees(8, 2, 2) and (degrees.shard, degrees.spread) == (4, 2)
