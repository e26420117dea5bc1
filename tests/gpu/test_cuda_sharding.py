"""FSDP2 on a CUDA device, on a mesh of one: its hooks, casts, streams and NCCL calls, though nothing travels."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from unmask.batch import Batch
from unmask.config.distributed import DistributedConfig, MixedPrecisionConfig
from unmask.config.results import CheckpointConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.expert_parallel import compute_in_place
from unmask.distributed.processes import Degrees
from unmask.distributed.ranks import build_meshes
from unmask.distributed.runtime import Runtime
from unmask.distributed.shard import write_parts
from unmask.models.folders import SHARDED
from unmask.models.registry import plan_folder
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.rng import NoiseStream
from unmask.training.network import OPTIMIZER, Network, NetworkSettings, build_network, moments, restore, weights
from unmask.training.optim import build_optimizer
from unmask.training.saver import Saver
from unmask.training.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

FOLDERS = {"llada": "llada_tiny", "diffusion_gemma": "diffusion_gemma_step"}


@pytest.fixture
def nccl(tmp_path, cuda):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("cpu:gloo,cuda:nccl", store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def built(folder: Path, runtime: Runtime, **section: Any) -> Network:
    """Build a network as a run does."""
    distributed = DistributedConfig(device="cuda", **section)
    plan = plan_folder(str(folder), "model")
    return build_network(
        NetworkSettings(plan, "float32", None, False, distributed, OptimizerConfig(lr=1e-3), 0), runtime
    )


def steps(network: Network, batch: Batch, runtime: Runtime, numbers: range) -> list[float]:
    """Make some steps; return the losses and gradient norms."""
    config: Any = network.model.config
    objective = (
        MDLM(config.mask_token_id, eps=0.2)
        if network.plan.family.noise == "mask"
        else CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id)
    )
    parts = (network.model, objective, [batch])
    made = [train_step(*parts, NoiseStream(n), network.optimizer, runtime, 1.0) for n in numbers]
    return [number for step in made for number in (step.loss, step.grad_norm)]


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("family", FOLDERS)
def test_a_sharded_run_equals_a_whole_one_and_resumes(
    fixtures: Path, cuda, nccl, batch, tmp_path: Path, family: str, offload: str | None
) -> None:
    folder, whole = fixtures / FOLDERS[family], Runtime(cuda, None)
    shared = Runtime(cuda, None, meshes=build_meshes(Degrees(1, 1, 1), "cuda"))
    expected = steps(built(folder, whole), batch, whole, range(4))
    network = built(folder, shared, offload_policy=offload)
    assert {parameter.device.type for parameter in network.model.parameters()} == {offload or "cuda"}
    assert {buffer.device.type for buffer in network.model.buffers()} <= {"cuda"}
    assert steps(network, batch, shared, range(2)) == pytest.approx(expected[:4], rel=1e-4)
    for tensors, place in ((moments(network), tmp_path / OPTIMIZER), (weights(network), tmp_path)):
        assert write_parts(tensors, place / SHARDED, shared.ranks) is None
    assert steps(network, batch, shared, range(2, 4)) == pytest.approx(expected[4:], rel=1e-4)
    resumed = built(folder, shared, offload_policy=offload)
    restore(resumed, tmp_path)
    assert steps(resumed, batch, shared, range(2, 4)) == pytest.approx(expected[4:], rel=1e-4)
    assert {tensor.device.type for name, tensor in moments(resumed).items() if "exp" in name} == {offload or "cuda"}


@pytest.mark.parametrize("family", FOLDERS)
def test_blocks_that_stay_gathered_change_nothing(fixtures: Path, cuda, nccl, batch, family: str) -> None:
    folder, shared = fixtures / FOLDERS[family], Runtime(cuda, None, meshes=build_meshes(Degrees(1, 1, 1), "cuda"))
    freed, kept = (
        steps(built(folder, shared, reshard_after_forward=freed), batch, shared, range(3)) for freed in (True, False)
    )
    assert kept == pytest.approx(freed, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_computed_in_place_change_nothing(fixtures: Path, cuda, nccl, batch, checkpointing: bool) -> None:
    folder, runtime = fixtures / FOLDERS["diffusion_gemma"], Runtime(cuda, None)
    options = {"activation_checkpointing": checkpointing}
    expected = steps(built(folder, runtime, **options), batch, runtime, range(3))
    network = built(folder, runtime, **options)
    mesh = build_meshes(Degrees(1, 1, 1), "cuda").model
    for block in network.model.get_submodule(network.plan.family.shard.blocks).children():
        compute_in_place(block.get_submodule("experts"), mesh)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-3), network.model)
    found = steps(dataclasses.replace(network, optimizer=optimizer), batch, runtime, range(3))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FOLDERS)
def test_weights_that_travel_in_bf16_leave_the_residual_stream_in_fp32(
    fixtures: Path, cuda, nccl, batch, family: str
) -> None:
    autocast = torch.bfloat16
    whole, shared = (Runtime(cuda, autocast, meshes=m) for m in (None, build_meshes(Degrees(1, 1, 1), "cuda")))
    expected = steps(built(fixtures / FOLDERS[family], whole), batch, whole, range(2))
    network = built(fixtures / FOLDERS[family], shared, mp_policy=MixedPrecisionConfig("bfloat16"))
    dtypes: set[torch.dtype] = set()

    def note(_module: nn.Module, inputs: tuple, output: Any) -> None:
        dtypes.update((inputs[0].dtype, (output[0] if isinstance(output, tuple) else output).dtype))

    for block in network.model.get_submodule(network.plan.family.shard.blocks).children():
        block.register_forward_hook(note)
    assert steps(network, batch, shared, range(2)) == pytest.approx(expected, rel=3e-2)
    assert dtypes == {torch.float32}


def save_on_the_second(folder: Path, place: Path) -> None:
    """Save a network from the second device, in a process that has used no other one."""
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    saver = Saver(place, CheckpointConfig(), built(folder, Runtime(device, None)), Runtime(device, None), {}, None)
    saver.save(1, {}, last=False)
    saver.wait()
    assert saver.newest is not None
    assert not torch._C._cuda_hasPrimaryContext(0)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch._C._cuda_hasPrimaryContext(1)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.gpus
def test_a_save_makes_no_context_on_another_device(fixtures: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: there is no other one to make a context on (`make gpus`)")
    root = Path(__file__).parents[2]
    code = "import sys; from pathlib import Path; from tests.gpu.test_cuda_sharding import save_on_the_second as save"
    words = [sys.executable, "-c", f"{code}; save(*map(Path, sys.argv[1:]))", fixtures / FOLDERS["llada"], tmp_path]
    done = subprocess.run(words, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
