"""A network goes onto its device a tensor at a time, with the bits that it would have if it were built on the host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.config.distributed import DistributedConfig
from unmask.config.model import ModelConfig, PeftConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import Runtime
from unmask.errors import ModelError
from unmask.models.loading import build_model, load_model, save_model
from unmask.models.lora.quantized import packed_tensors
from unmask.models.registry import plan_folder, plan_model
from unmask.training.lora import attach
from unmask.training.network import NetworkSettings, build_network, draw_adapter

WIDTH, HIDDEN, ROWS = 512, 2048, 8192
# Loads the folder argv[1] onto the meta device, where nothing is kept, in each of the ways that follow, and prints how
# far the memory that the host must hold rose meanwhile. Pages of mapped files are the system's to drop, and not
# counted. Each way is tried in a fork, whose memory is its own.
PEAK = """
import os, sys, torch
from unmask.config.distributed import DistributedConfig
from unmask.config.model import PeftConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import Runtime
from unmask.models import weights
from unmask.models.loading import build_model
from unmask.models.registry import plan_folder
from unmask.training import network
import peft, unmask.models.lora.attach
from bitsandbytes.functional import quantize_4bit

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

plan, device = plan_folder(sys.argv[1], "x"), torch.device("meta")
adapters = {"lora": PeftConfig(r=2), "qlora": PeftConfig(r=2, load_in_4bit=True)}
network.build_optimizer = lambda *_: None
quantize_4bit(torch.empty(64, device=device), compress_statistics=True)
read = weights._assemble

def reading(*arguments):
    global peak
    part = read(*arguments).clone()  # a mapped page is not the process's own until it is copied
    peak = max(peak, anonymous())
    return part

weights._assemble = reading
for way in sys.argv[2:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    peak, before = 0, anonymous()
    if way == "answer":
        build_model(plan, None, device)
    else:
        settings = (plan, "float32", adapters.get(way), False, DistributedConfig(), OptimizerConfig(), 0)
        network.build_network(network.NetworkSettings(*settings), Runtime(device, None))
    print(peak - before, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 134 MB, its largest tensors of 17 MB."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"d_model": WIDTH, "n_heads": 8, "n_layers": 6, "mlp_hidden_size": HIDDEN, "vocab_size": ROWS}
    plan = plan_model(ModelConfig(config={**tiny.model, **sizes}))
    save_model(build_model(plan, None), plan, folder)
    return folder


@pytest.mark.slow
def test_the_host_holds_a_tensor_at_a_time(wide: Path) -> None:
    ways = ["full", "lora", "qlora", "answer"]
    words = [sys.executable, "-c", PEAK, str(wide), *ways]
    # As the large tensors of a real model are, all are given back to the system when they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = 4 * ROWS * WIDTH
    risen = dict(zip(ways, map(int, done.stdout.split()), strict=True))
    assert all(largest <= each < largest + 8 * 10**6 for each in risen.values()), risen


ADAPTERS: dict[str, PeftConfig | None] = {
    "full": None,
    "lora": PeftConfig(r=2, modules_to_save=["*norm"]),
    "dora": PeftConfig(r=2, use_dora=True),
    "qlora": PeftConfig(r=2, load_in_4bit=True),
    "qdora": PeftConfig(r=2, load_in_4bit=True, use_dora=True),
    "experts": PeftConfig(r=2, load_in_4bit=True, target_parameters=["*.experts.*"]),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llada", kind) for kind in ADAPTERS if kind != "experts"] + [("diffusion_gemma", kind) for kind in ADAPTERS],
)
def test_it_has_the_bits_of_a_network_built_on_the_host(
    tiny, gemma_values: Callable[..., dict], tmp_path: Path, family: str, kind: str
) -> None:
    fresh = plan_model(ModelConfig(config=tiny.model if family == "llada" else gemma_values()))
    save_model(build_model(fresh, None), fresh, tmp_path)
    section, plan = ADAPTERS[kind], plan_folder(str(tmp_path), "x")
    settings = NetworkSettings(plan, "bfloat16", section, False, DistributedConfig(), OptimizerConfig(), 7)
    network = build_network(settings, Runtime(torch.device("cpu"), None))
    expected = build_model(plan, "bfloat16")
    if section is not None:
        attach(expected, section, "")
        draw_adapter(expected, 7)
    found, wanted = network.model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )
    packed = packed_tensors(expected)
    assert bool(packed) == (section is not None and section.load_in_4bit)
    for name, each in packed_tensors(network.model).items():
        assert torch.equal(each.dense(), packed[name].dense()) and each.dense().dtype == torch.bfloat16
    trained = {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in expected.named_parameters() if parameter.requires_grad}


def test_a_device_too_small_is_named(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to_empty", full)
    with pytest.raises(ModelError, match=r"the weights of the model, \d+\.\d GB, do not fit on cpu; .*bfloat16"):
        load_model(str(tiny_base))
