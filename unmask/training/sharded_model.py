"""A network that several ranks share: built and sharded on the meta device, then filled a slice at a time.

An adapter is small beside its network: each rank keeps a whole copy of it on the host as the go-between of files (which
hold whole matrices) and shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config.distributed import DistributedConfig
from unmask.config.model import PeftConfig
from unmask.distributed.load import adapter_tensors, allocate, load_folder, load_tensors, whole_adapter
from unmask.distributed.mesh import Meshes
from unmask.distributed.runtime import Runtime, set_switches
from unmask.distributed.shard import shard_model, whole_view
from unmask.errors import ConfigError
from unmask.models.family import FileLayout
from unmask.models.loading import draw_weights, empty_network
from unmask.models.lora.files import is_trained, read_adapter, write_adapter
from unmask.models.registry import ModelPlan
from unmask.training.adapter_draw import draw_adapter


@dataclass(frozen=True)
class SharedNetwork:
    """A sharded network and how its weights meet files.

    Attributes:
        model: the network; parameters are shards.
        meshes: the arrangement of ranks.
        source: the folder that it came from; None for a fresh network.
        layout: what its files hold beside it.
        adapter: a whole copy of the adapter on the host, in a network whose other tensors are on the meta device; None
            when the network itself is trained.
        adapter_config: its peft.LoraConfig; None without an adapter.
    """

    model: nn.Module
    meshes: Meshes
    source: Path | None
    layout: FileLayout
    adapter: nn.Module | None
    adapter_config: Any

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (state-dict key, tensor over the whole network) of what a checkpoint holds: the adapter or all."""
        for name, tensor in self.model.state_dict().items():
            if self.adapter is None or is_trained(name):
                yield name, whole_view(name, tensor, self.model, self.meshes)

    def read_plain(self, folder: Path) -> None:
        """Read a folder as one process writes it: the weights, or the adapter, of which each rank takes its part."""
        if self.adapter is None:
            load_folder(self.model, self.meshes, folder, self.layout)
            return
        read_adapter(self.adapter, folder)
        load_tensors(self.model, self.meshes, adapter_tensors(self.adapter))

    def gather_adapter(self) -> None:
        """Bring the trained values of all ranks into the whole copy of the adapter."""
        assert self.adapter is not None
        whole = dict(adapter_tensors(self.adapter))
        for name, tensor in self.trained():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore
            whole[name].data.copy_(full)

    def write_adapter(self, folder: Path) -> None:
        """Write the whole copy of the adapter in PEFT's format."""
        assert self.adapter is not None
        write_adapter(self.adapter, self.adapter_config, folder)


def build_shared(
    plan: ModelPlan,
    dtype: str,
    peft: PeftConfig | None,
    section: DistributedConfig,
    runtime: Runtime,
    seed: int,
) -> SharedNetwork:
    """Build, shard and fill a network for training; all ranks call it.

    Args:
        plan: the model.
        dtype: of the master weights.
        peft: the adapter to train; None trains the network.
        section: the `distributed` section.
        runtime: device and ranks.
        seed: of fresh weights and adapters, which are the same on any number of ranks.

    Raises:
        ModelError: weights that do not fit the network.
        ConfigError: an option of `peft` that needs the whole network on one device.
    """
    meshes = runtime.meshes
    assert meshes is not None
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config).to(getattr(torch, dtype))
    adapter = config = None
    if peft is not None:
        for name in ("load_in_4bit", "use_dora"):
            if getattr(peft, name, False):
                raise ConfigError(f"peft.{name}: needs the whole network on one device; use one process, or set false")
        from unmask.training.lora import attach

        config = attach(model, peft, plan.source)
        adapter = whole_adapter(model)
        draw_adapter(adapter, seed)
    set_switches(model, section, runtime)
    shard_model(model, section, meshes)
    place = runtime.device if section.offload_policy is None else torch.device("cpu")
    allocate(model, place, runtime.ranks, "use more processes, or set distributed.offload_policy: cpu")
    if plan.folder is not None:
        load_folder(model, meshes, plan.folder, plan.family.files)
    else:
        load_tensors(model, meshes, _fresh(plan, dtype, seed))
    if adapter is not None:
        load_tensors(model, meshes, ((n, p) for n, p in adapter_tensors(adapter) if ".lora_" in n))
    return SharedNetwork(model.train(), meshes, plan.folder, plan.family.files, adapter, config)


def _fresh(plan: ModelPlan, dtype: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draw a fresh network whole, as one process does, so that its weights do not depend on the number of ranks."""
    with torch.device("meta"):
        whole = empty_network(plan.family, plan.config)
    whole.to_empty(device="cpu")
    draw_weights(whole, plan.family, seed)
    yield from whole.to(getattr(torch, dtype)).state_dict().items()
