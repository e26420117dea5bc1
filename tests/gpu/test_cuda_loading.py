"""A network is built on the CUDA device itself, packed there too, with the weights that the CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unmask.config.distributed import DistributedConfig
from unmask.config.model import PeftConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import Runtime
from unmask.models.lora.quantized import packed_tensors
from unmask.models.registry import plan_folder
from unmask.training.network import Network, NetworkSettings, build_network

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

ADAPTERS = {
    "full": None,
    "lora": PeftConfig(r=2, modules_to_save=["*norm"]),
    "qlora": PeftConfig(r=2, load_in_4bit=True),
    "qdora": PeftConfig(r=2, load_in_4bit=True, use_dora=True),
}


def built(folder: Path, device: torch.device, adapter: PeftConfig | None) -> Network:
    plan = plan_folder(str(folder), "model")
    settings = NetworkSettings(plan, "float32", adapter, False, DistributedConfig(), OptimizerConfig(), 0)
    return build_network(settings, Runtime(device, None))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["llada_tiny", "diffusion_gemma_step"])
def test_all_of_it_is_on_the_device(fixtures: Path, cuda: torch.device, family: str, kind: str) -> None:
    here = built(fixtures / family, torch.device("cpu"), ADAPTERS[kind]).model
    there = built(fixtures / family, cuda, ADAPTERS[kind]).model
    held = dict(there.named_parameters()) | dict(there.named_buffers())
    assert {tensor.device.type for tensor in held.values()} == {cuda.type}
    for name, parameter in here.named_parameters():
        torch.testing.assert_close(held[name].cpu(), parameter, rtol=1e-5, atol=1e-6)
    for name, packed in packed_tensors(here).items():
        # Kernels of another device may round a code or a block's scale the other way.
        torch.testing.assert_close(packed_tensors(there)[name].dense().cpu(), packed.dense(), rtol=0.1, atol=0.05)
