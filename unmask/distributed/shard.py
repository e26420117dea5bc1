"""Sharding from outside (FSDP2): which modules of a family travel together, and which slice of a tensor a rank holds.

Each block of a network is one group: gathered right before it runs, freed right after. What lies outside the blocks
(embedding, final norm, head, tied or not) is the root's group and stays gathered from the first call of a step to its
backward pass, so that a loss may read the head as a matrix. Gradients are summed over ranks, not averaged: the loss is
divided by a count over all ranks already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from unmask.config.distributed import DistributedConfig, MixedPrecisionConfig
from unmask.distributed.expert import expert_dispatch, narrow_experts
from unmask.distributed.ranks import Meshes
from unmask.models.registry import family_of
from unmask.models.weights import Piece, whole_piece


def shard_model(model: nn.Module, section: DistributedConfig, meshes: Meshes) -> None:
    """Shard a network in place; its parameters may be on the meta device.

    Args:
        model: the whole network, adapters attached.
        section: the `distributed` section.
        meshes: the arrangement of ranks.
    """
    plan = family_of(model.config).shard
    options = {"mp_policy": _precision(section.mp_policy), "offload_policy": _offload(section)}
    for block in model.get_submodule(plan.blocks).children():
        if meshes.experts is not None and plan.experts is not None:
            experts = block.get_submodule(plan.experts)
            block.dispatch = expert_dispatch(meshes.experts["ep"].get_group())  # pyright: ignore[reportArgumentType]
            narrow_experts(experts, meshes.experts["ep"].get_local_rank(), meshes.degrees.experts)
            fully_shard(experts, mesh=meshes.experts_data, **options)
        fully_shard(block, mesh=meshes.model, **options)
    # Reading the head after the forward pass relies on this: the root's group is not freed at its end.
    fully_shard(model, mesh=meshes.model, reshard_after_forward=False, **options)
    for method in plan.methods:
        _hook_method(model, method)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "set_reduce_scatter_unused_params"):
            # A rank whose rows used no gradient of some parameter still takes part in the sum, with zeros.
            module.set_reduce_scatter_unused_params(True)


@dataclass(frozen=True, eq=False)
class _Call:
    """A method's arguments as one thing that FSDP2 does not look into."""

    take: Callable[[], Any]


def _hook_method(model: nn.Module, name: str) -> None:
    """Let FSDP2 gather the root's group before a method of the network runs, as before `forward`.

    It would look for gradients of the arguments to tell when the root's backward pass is over. Of a decoder's that is
    when the encoder's has yet to come: the group would be freed, gathered and summed once more.
    """
    method, hooked = getattr(model, name), f"hooked_{name}"
    setattr(model, hooked, lambda call: call.take())
    register_fsdp_forward_method(model, hooked)
    run = getattr(model, hooked)
    setattr(model, name, lambda *args, **kwargs: run(_Call(lambda: method(*args, **kwargs))))


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP2 manages; none for a network that is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _precision(section: MixedPrecisionConfig | None) -> MixedPrecisionPolicy:
    section = section or MixedPrecisionConfig()
    param, reduce, output = (
        None if name is None else getattr(torch, name)
        for name in (section.param_dtype, section.reduce_dtype, section.output_dtype)
    )
    # Inputs are not cast: rotary tables are among them, and stay fp32.
    return MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce, output_dtype=output, cast_forward_inputs=False)


def _offload(section: DistributedConfig) -> OffloadPolicy:
    return OffloadPolicy() if section.offload_policy is None else CPUOffloadPolicy()


def pieces(model: nn.Module, meshes: Meshes | None) -> Iterator[tuple[str, Piece]]:
    """Yield (state-dict key, this rank's piece) of every parameter and buffer that is saved."""
    return ((name, piece(tensor, meshes)) for name, tensor in model.state_dict().items())


def piece(tensor: Tensor, meshes: Meshes | None) -> Piece:
    """Return what this rank holds of a tensor of the network or its optimizer."""
    whole = whole_view(tensor, meshes)
    if not isinstance(whole, DTensor):
        return whole_piece(whole)
    shape, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    place = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
    return Piece(whole.to_local(), whole.shape, place)


def whole_view(tensor: Tensor, meshes: Meshes | None) -> Tensor:
    """Return a tensor of the network or its optimizer as this rank's part of the whole network's.

    FSDP2's own DTensor says the same for everything but experts under expert parallelism, of which it sees only those
    that this rank's neighbours do not have: their tensor becomes one over all experts, sharing the memory.
    """
    if meshes is None or meshes.experts is None:
        return tensor
    if not isinstance(tensor, DTensor) or tensor.device_mesh != meshes.experts_data:
        return tensor
    shape = torch.Size((tensor.shape[0] * meshes.degrees.experts, *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    placements = (Replicate(), Shard(0), Shard(0))
    return DTensor.from_local(
        tensor.to_local(), meshes.experts, placements, run_check=False, shape=shape, stride=stride
    )
