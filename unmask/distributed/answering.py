"""A network that answers on one rank or several: whole on each of them, or one copy that all share."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from unmask.config.distributed import DistributedConfig
from unmask.distributed.joint_calls import JointCalls
from unmask.distributed.load import adapter_tensors, allocate, load_tensors, whole_adapter
from unmask.distributed.mesh import Degrees, build_meshes
from unmask.distributed.ranks import Ranks
from unmask.distributed.shard import pieces, shard_model
from unmask.errors import ConfigError
from unmask.models.folders import find_adapter, read_generation
from unmask.models.loading import apply_adapter, empty_network, load_model
from unmask.models.lora.files import read_adapter
from unmask.models.registry import ModelPlan, plan_folder
from unmask.models.weights import base_tensors, fill, set_dtypes


def load_for_answers(
    name: str, dtype: str | None, device: torch.device, adapter: str | None, ranks: Ranks, shard: bool
) -> tuple[nn.Module, contextlib.AbstractContextManager]:
    """Load a checkpoint for rows that are divided among ranks; all ranks call it.

    Args:
        name, dtype, device, adapter: as `registry.load_model`.
        ranks: all of them.
        shard: every rank keeps a part of the weights, read from the files as such, and gathers a block when it runs;
            False loads the whole network on each.

    Returns:
        the network in eval mode, and the context in which ranks call it, for `rows.divide_rows`; it may be entered
        again and again.

    Raises:
        ConfigError: `shard` on one rank.
        ModelError, TrainingError: as loading does; no memory for a part.
    """
    if not shard:
        return load_model(name, dtype, device, adapter), contextlib.nullcontext()
    if ranks.size == 1:
        raise ConfigError("--shard: one process has nobody to share the model with; add --nproc-per-node N")
    plan = plan_folder(name, "checkpoint")
    model = load_shared(plan, dtype, device, adapter, ranks)
    return model, JointCalls(model, ranks)


def load_shared(
    plan: ModelPlan, dtype: str | None, device: torch.device, adapter: str | None, ranks: Ranks
) -> nn.Module:
    """Build, shard and fill a network that is not trained; all ranks call it. Arguments as `load_for_answers`."""
    assert plan.folder is not None
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config)
    model = set_dtypes(model, plan.folder, None if dtype is None else getattr(torch, dtype))
    whole = None
    if adapter is not None:
        apply_adapter(model, adapter)
        whole = whole_adapter(model)
        read_adapter(whole, find_adapter(adapter))
    model.requires_grad_(False)
    meshes = build_meshes(Degrees(ranks.size), device.type)
    shard_model(model, DistributedConfig(), meshes)
    allocate(model, device, ranks, "use more processes")
    fill(base_tensors(pieces(model, meshes)), plan.folder, plan.family.files)
    if whole is not None:
        load_tensors(model, meshes, adapter_tensors(whole))
    model.generation = read_generation(plan.folder)  # pyright: ignore[reportArgumentType]
    return model.eval()
