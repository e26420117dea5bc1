"""A run's network and optimizer, whole on one process or shared by several: how they start and are restored."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.config.distributed import DistributedConfig
from unmask.config.model import PeftConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.failures import own_share
from unmask.distributed.processes import local_size
from unmask.distributed.ranks import Meshes
from unmask.distributed.runtime import Runtime, set_switches
from unmask.distributed.shard import (
    adapter_tensors,
    allocate,
    load_tensors,
    piece,
    pieces,
    shard_model,
    whole_adapter,
    whole_view,
)
from unmask.errors import CheckpointError, ConfigError
from unmask.models.experts import freeze_routers
from unmask.models.folders import read_generation, stored_tensors
from unmask.models.loading import (
    build_model,
    check_memory,
    draw_weights,
    empty_network,
    write_config,
    write_generation,
)
from unmask.models.lora.files import adapter_state, is_trained, read_adapter, write_adapter_config
from unmask.models.lora.quantized import base_pieces
from unmask.models.manifest import intact
from unmask.models.registry import ModelPlan
from unmask.models.weights import Piece, allocate_whole, base_tensors, fill
from unmask.places import temporary_folder
from unmask.rng import key
from unmask.training.lora import attach
from unmask.training.optim import build_optimizer, masters_of

OPTIMIZER = "optimizer"  # folder in a checkpoint: safetensors of `<parameter>/<moment>` and `<parameter>/master`
_MASTER = "master"


@dataclass(frozen=True)
class NetworkSettings:
    """What a run's network is made from.

    Attributes:
        dtype: of the network's weights.
        peft: the adapter to train; None trains the network.
        seed: of fresh weights and adapters, the same on any number of ranks.
    """

    plan: ModelPlan
    dtype: str
    peft: PeftConfig | None
    freeze_router: bool
    distributed: DistributedConfig
    optimizer: OptimizerConfig
    seed: int


@dataclass(frozen=True)
class Network:
    """A network ready to be trained.

    Attributes:
        model, optimizer: whole, or this rank's shards.
        meshes: the arrangement of ranks; None on one process.
        adapter: a network with the whole adapter: on one process `model`, on several a copy on the host whose other
            tensors are on the meta device; None when the network itself is trained.
        adapter_config: its peft.LoraConfig; None without an adapter.
    """

    model: nn.Module
    optimizer: Optimizer
    plan: ModelPlan
    dtype: str
    meshes: Meshes | None
    adapter: nn.Module | None
    adapter_config: Any


def build_network(settings: NetworkSettings, runtime: Runtime) -> Network:
    """Load or draw the network of a run; all ranks call it.

    Raises:
        ModelError: weights that do not fit the network.
        ConfigError: an adapter that the network cannot have, or that needs the whole network on one device.
    """
    plan, peft, meshes = settings.plan, settings.peft, runtime.meshes
    adapter = config = None
    if meshes is None and plan.folder is None:
        model = build_model(plan, settings.dtype, runtime.device, settings.seed)
    else:
        with torch.device("meta"):
            model = empty_network(plan.family, plan.config).to(getattr(torch, settings.dtype))
    if peft is not None:
        for name in ("load_in_4bit", "use_dora"):
            if meshes is not None and getattr(peft, name):
                raise ConfigError(f"peft.{name}: needs the whole network on one device; use one process, or set false")
        config = attach(model, peft, plan.source)
        if meshes is not None:
            adapter = whole_adapter(model)
            draw_adapter(adapter, settings.seed)
    set_switches(model, settings.distributed, runtime)
    if meshes is None:
        with intact(plan.folder):
            adapter = _fill(model, settings, runtime.device)
    else:
        with intact(plan.folder, share=own_share()):
            _shard_and_fill(model, adapter, settings, runtime, meshes)
    model.train()
    if settings.freeze_router:
        freeze_routers(model)
    shard = 0 if meshes is None else runtime.ranks.rank % meshes.degrees.shard
    optimizer = build_optimizer(settings.optimizer, model, settings.seed, shard)
    return Network(model, optimizer, plan, settings.dtype, meshes, adapter, config)


def _fill(model: nn.Module, settings: NetworkSettings, device: torch.device) -> nn.Module | None:
    """Load a network that is on the meta device, its adapter attached, onto its device, a tensor at a time.

    A tensor that is kept in 4 bits is packed as it arrives. Returns the network if it has an adapter.
    """
    plan, peft = settings.plan, settings.peft
    if plan.folder is not None:
        allocate_whole(model, device)
        fill(base_pieces(model), plan.folder, plan.family.files)
        model.generation = read_generation(plan.folder)  # pyright: ignore[reportArgumentType]
    if peft is None:
        return None
    _round(base_pieces(model), settings.dtype)
    draw_adapter(model, settings.seed)
    if peft.use_dora:
        from unmask.models.lora.attach import restart_magnitudes  # PEFT takes seconds to import

        restart_magnitudes(model)
    return model


@torch.no_grad()
def _round(parts: Iterable[tuple[str, Piece]], dtype: str) -> None:
    """Round what of a base is trained beside an adapter, and therefore fp32, to the base's dtype, to start from it."""
    for _, part in parts:
        if part.pack is None:
            part.local.copy_(part.local.to(getattr(torch, dtype)))  # nothing is done where it has that dtype


def _shard_and_fill(
    model: nn.Module, adapter: nn.Module | None, settings: NetworkSettings, runtime: Runtime, meshes: Meshes
) -> None:
    """Shard a network on the meta device, allocate each rank's shards and load or draw their values."""
    plan, section = settings.plan, settings.distributed
    with torch.device("meta"):
        whole = empty_network(plan.family, plan.config)
    if plan.folder is None:
        check_memory(whole, copies=local_size())
    shard_model(model, section, meshes)
    host = None if section.offload_policy is None else torch.device(section.offload_policy)
    remedy = "use more processes" + (", or set distributed.offload_policy: cpu" if host is None else "")
    allocate(model, runtime.device, runtime.ranks, remedy, host)
    if plan.folder is not None:
        fill(base_tensors(pieces(model, meshes)), plan.folder, plan.family.files)
    else:  # drawn whole, as one process does, so that weights do not depend on the number of ranks
        whole.to_empty(device="cpu")
        draw_weights(whole, plan.family, settings.seed)
        load_tensors(model, meshes, whole.to(getattr(torch, settings.dtype)).state_dict().items())
    if adapter is not None:
        _round(base_tensors(pieces(model, meshes)), settings.dtype)
        load_tensors(model, meshes, ((name, p) for name, p in adapter_tensors(adapter) if ".lora_" in name))


@torch.no_grad()
def draw_adapter(model: nn.Module, seed: int) -> None:
    """Draw every `lora_A` uniformly within ±1/√inputs, as PEFT does; `lora_B` is zero, so that nothing changes yet.

    A function of (seed, name): the same on any number of ranks. Adapters on the meta device are left alone.
    """
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.zero_()
        if ".lora_A" not in name or parameter.is_meta:
            continue
        generator = torch.Generator().manual_seed(key(seed, f"adapter/init/{name}") % 2**32)
        bound = 1 / math.sqrt(parameter.shape[-1])
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


def weights(network: Network) -> dict[str, Tensor]:
    """Return state-dict key → this rank's part of the whole tensor, sharing memory; empty with an adapter."""
    if network.adapter is not None:
        return {}
    return {name: whole_view(tensor, network.meshes) for name, tensor in network.model.state_dict().items()}


def moments(network: Network) -> dict[str, Tensor]:
    """Return `<parameter>/<moment>` → this rank's part of the optimizer's state, sharing memory; masters among it."""
    masters, state = masters_of(network.optimizer), network.optimizer.state
    tensors = {}
    for name, parameter in network.model.named_parameters():
        updated = masters.get(parameter, parameter)
        kept = {_MASTER: updated} if parameter in masters else {}
        for moment, tensor in {**kept, **state.get(updated, {})}.items():
            tensors[f"{name}/{moment}"] = whole_view(tensor, network.meshes)
    return tensors


@torch.no_grad()
def gather_adapter(network: Network) -> dict[str, Tensor]:
    """Return a copy of the adapter on the host, by PEFT's keys; all ranks call it. Empty without an adapter."""
    if network.adapter is None:
        return {}
    if network.adapter is not network.model:
        whole = dict(adapter_tensors(network.adapter))
        for name, tensor in network.model.state_dict().items():
            if is_trained(name):
                part: Any = whole_view(tensor, network.meshes)
                if hasattr(part, "full_tensor"):  # offloaded shards are gathered where the mesh's collectives are
                    part = part.to(part.device_mesh.device_type).full_tensor()
                whole[name].copy_(part)
    return adapter_state(network.adapter)


def restore(network: Network, folder: Path) -> None:
    """Load weights and optimizer state from a checkpoint written by any number of ranks; all ranks call it.

    Raises:
        CheckpointError: saved for other parameters than this run trains, or with masters where this run has none, or
            the other way round.
    """
    model, meshes = network.model, network.meshes
    if network.adapter is None:
        fill(pieces(model, meshes), folder, network.plan.family.files)
    else:
        read_adapter(network.adapter, folder)
        if meshes is not None:
            load_tensors(model, meshes, adapter_tensors(network.adapter))
    fill(_empty_moments(network, folder / OPTIMIZER), folder / OPTIMIZER)


def _empty_moments(network: Network, folder: Path) -> Iterator[tuple[str, Piece]]:
    """Allocate optimizer state for each tensor of a folder, sharded like its parameter, and yield it to be filled."""
    stored, masters = stored_tensors(folder), masters_of(network.optimizer)
    trained = {name: parameter for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    mismatched = {entry.rpartition("/")[0] for entry in stored} ^ set(trained)
    if mismatched:
        raise CheckpointError(f"{folder}: saved for other parameters than this run trains (first: {min(mismatched)})")
    _check_masters(
        {entry.rpartition("/")[0] for entry in stored if entry.endswith("/" + _MASTER)},
        {name for name, parameter in trained.items() if parameter in masters},
        folder,
    )
    for entry, tensor in stored.items():
        name, _, moment = entry.rpartition("/")
        updated = masters.get(trained[name], trained[name])
        state = network.optimizer.state[updated]
        value = updated if moment == _MASTER else state.get(moment)
        if value is None:
            if tensor.shape:
                value = torch.zeros_like(updated, memory_format=torch.preserve_format, requires_grad=False)
            else:
                value = torch.zeros((), dtype=torch.float32, device=updated.device)
            state[moment] = value
        yield entry, piece(value, network.meshes)


def _check_masters(stored: set[str], wanted: set[str], folder: Path) -> None:
    """Refuse a checkpoint with masters for a run without them, and the other way round."""
    if wanted - stored:
        raise CheckpointError(
            f"{folder}: has no fp32 master of {min(wanted - stored)}, whose bf16 weights are all that it holds; set "
            "optimizer.stochastic_rounding: true to go on without masters, or begin a new run from its weights "
            "(model.pretrained_model_name_or_path)"
        )
    if stored - wanted:
        raise CheckpointError(
            f"{folder}: holds an fp32 master of {min(stored - wanted)}, and optimizer.stochastic_rounding trains "
            "without; set it to false"
        )


def other_files(
    network: Network, tokenizer: Any, template: str, run_config: str, stop_ids: Sequence[int]
) -> dict[str, bytes]:
    """Return path → content of the files other than tensors in each checkpoint of a run.

    Args:
        template: the source of the chat template, which goes into the tokenizer, so that inference prompts as training
            did.
        run_config: the run's YAML.
        stop_ids: the tokens that end an answer, which go into generation_config.json; an adapter's says nothing else.
    """
    with temporary_folder("unmask-beside-") as folder:
        if network.adapter is not None:
            write_adapter_config(network.adapter, network.adapter_config, folder)
        else:
            write_config(network.plan, network.dtype, folder)
        write_generation({**read_generation(folder), "eos_token_id": list(stop_ids)}, folder)
        saved = copy.copy(tokenizer)
        saved.chat_template = template
        saved.save_pretrained(folder)
        (folder / "config.yaml").write_text(run_config, encoding="utf-8")
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
