"""Sharding from outside (FSDP2): which modules of a family travel together, and which slice of a tensor a rank holds.

Each block of a network is one group: gathered right before it runs, freed right after. What lies outside the blocks
(embedding, final norm, head, tied or not) is the root's group and stays gathered from the first call of a step to its
backward pass, so that a loss may read the head as a matrix. Gradients are summed over ranks, not averaged: the loss is
divided by a count over all ranks already.

A network is built and sharded on the meta device, so that memory is taken for shards only; then each rank reads the
slices that it keeps (`models.weights.fill` of `pieces`). A checkpoint has the parts that each rank has (`write_parts`).
Experts that ranks share out have a module of their own, `expert_parallel`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
from torch.distributed.checkpoint.api import CheckpointException
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
from unmask.distributed.expert_parallel import compute_in_place, expert_dispatch, narrow_experts, placed
from unmask.distributed.processes import experts_in_place
from unmask.distributed.ranks import Meshes, Ranks
from unmask.errors import TrainingError
from unmask.models.lora.files import is_trained
from unmask.models.registry import family_of
from unmask.models.weights import SHARD_BYTES, Piece, whole_piece


def shard_model(model: nn.Module, section: DistributedConfig, meshes: Meshes) -> None:
    """Shard a whole network, adapters attached, in place; its parameters may be on the meta device."""
    plan = family_of(model.config).shard
    # The values that a layer returns for others to attend to are a view, which nothing writes to.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor", UserWarning)
    precision = _precision(section.mp_policy)
    offload = OffloadPolicy() if section.offload_policy is None else CPUOffloadPolicy()
    # Between blocks the residual stream is as it was computed; `output_dtype` is of what leaves the network.
    in_place: set[nn.Parameter] = set()
    options: dict[str, Any] = {"offload_policy": offload, "ignored_params": in_place}
    options["mp_policy"] = replace(precision, output_dtype=None)
    _keep_embeddings_wide(model)
    blocks = list(model.get_submodule(plan.blocks).children())
    for block in blocks:
        if meshes.experts is not None and plan.experts is not None:
            experts = block.get_submodule(plan.experts)
            block.dispatch = expert_dispatch(meshes.experts["ep"].get_group())  # pyright: ignore[reportArgumentType]
            narrow_experts(experts, meshes.experts["ep"].get_local_rank(), meshes.degrees.experts)
            if experts_in_place(section, meshes.degrees):
                compute_in_place(experts, meshes.experts_data)
                in_place.update(experts.parameters())
            else:
                reshard = section.reshard_experts_after_forward
                fully_shard(experts, mesh=meshes.experts_data, reshard_after_forward=reshard, **options)
        fully_shard(block, mesh=meshes.model, reshard_after_forward=section.reshard_after_forward, **options)
    if meshes.experts is not None:
        _prefetch(blocks, plan.experts)
    for module in _apart(model, plan.blocks):
        fully_shard(module, mesh=meshes.model, **options)
    # Reading the head after the forward pass relies on this: the root's group is not freed at its end.
    whole = {**options, "mp_policy": precision}
    fully_shard(model, mesh=meshes.model, reshard_after_forward=False, **whole)
    for method in plan.methods:
        _hook_method(model, method)
    for module in (each for each in model.modules() if isinstance(each, FSDPModule)):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # A rank whose rows used no gradient of some parameter still takes part in the sum, with zeros.
        module.set_reduce_scatter_unused_params(True)


def _prefetch(blocks: Sequence[nn.Module], experts: str | None) -> None:
    """Have each block fetch the next one's weights, experts among them, before it computes; in backward the one before.

    By default FSDP2 relies on the host being ahead of the device; here it waits in each block for the counts of the
    exchange. As torchtitan does under expert parallelism (`models/llama4/infra/parallelize.py`).
    """
    units = []
    for block in blocks:
        inner = [] if experts is None else [block.get_submodule(experts)]
        units.append([module for module in (block, *inner) if isinstance(module, FSDPModule)])
    for one, following in pairwise(units):
        one[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(one)


def _keep_embeddings_wide(model: nn.Module) -> None:
    """Have embeddings return the dtype that their weights are stored in, whatever dtype these travel in.

    All else adds to what they return, so that this once makes the residual stream as wide as on one process.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_cast_output, module.weight.dtype))


def _cast_output(dtype: torch.dtype, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def _apart(model: nn.Module, blocks: str) -> list[nn.Module]:
    """Return the fp32 norms outside the blocks that are trained beside a bf16 embedding or head.

    FSDP2 takes trained parameters of one dtype a group, and what is not called as a module stays with the root.
    """
    trained = [
        (module, parameter.dtype)
        for name, module in model.named_modules()
        if not name.startswith(blocks + ".")
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    mixed = len({dtype for _, dtype in trained}) > 1
    return [module for module, dtype in trained if dtype == torch.float32] if mixed else []


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


def _precision(section: MixedPrecisionConfig | None) -> MixedPrecisionPolicy:
    section = section or MixedPrecisionConfig()
    param, reduce, output = (
        None if name is None else getattr(torch, name)
        for name in (section.param_dtype, section.reduce_dtype, section.output_dtype)
    )
    # Inputs are not cast: rotary tables are among them, and stay fp32.
    return MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce, output_dtype=output, cast_forward_inputs=False)


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
    return placed(tensor.to_local(), meshes.experts, (Replicate(), Shard(0), Shard(0)), shape)


def allocate(
    model: nn.Module, device: torch.device, ranks: Ranks, remedy: str, offload: torch.device | None = None
) -> None:
    """Give the shards of a network on the meta device memory, its values undefined.

    Args:
        device: where the network runs. Buffers are there in any case: FSDP2 brings parameters alone from elsewhere.
        offload: where its shards are between passes; None = where it runs.

    Raises:
        TrainingError: the device has not enough memory; the message ends in `remedy`.
    """
    place = offload or device
    try:
        model.to_empty(device=place)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    except torch.OutOfMemoryError:
        raise TrainingError(f"rank {ranks.rank}: the shards of the model do not fit on {place}; {remedy}") from None


@torch.no_grad()
def load_tensors(model: nn.Module, meshes: Meshes, whole: Iterable[tuple[str, Tensor]]) -> None:
    """Fill shards from whole tensors by name, for example freshly drawn ones; others stay as they are."""
    held = dict(pieces(model, meshes))
    for name, tensor in whole:
        part = held[name]
        if part.local.numel():
            part.local.copy_(tensor[part.place] if part.place else tensor)


def whole_adapter(model: nn.Module) -> nn.Module:
    """Return a copy of an adapted network on the meta device whose adapter alone is there, on the host, all zeros.

    An adapter is small beside its network: this is the go-between of files, which hold whole matrices, and shards.
    """
    adapter = copy.deepcopy(model)
    for name, parameter in list(adapter.named_parameters()):
        if is_trained(name):
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
            setattr(adapter.get_submodule(owner), attribute, value)
    return adapter


def adapter_tensors(adapter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (state-dict key, tensor) of what an adapter trains."""
    return ((name, parameter) for name, parameter in adapter.named_parameters() if is_trained(name))


def write_parts(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> str | None:
    """Write named tensors over all ranks, each its parts, in safetensors files of its own; all ranks call it.

    Returns:
        what the disk said against it, on every rank if on one; None when all is written.
    """
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():  # a file is put together in memory, so that none may be large
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > SHARD_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + nbytes
    writer = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, (OSError, SafetensorError)):
            raise cause from error  # torch's own is no Exception
        if isinstance(cause, OSError):
            cause.filename = cause.filename or str(folder)
        return disk_problem(ranks, rank, cause)
    return None


def disk_problem(ranks: Ranks, rank: int, error: BaseException) -> str:
    """Return what a failed write says, and on which rank where there are several."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    if isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {reason}"
    return reason if ranks.size == 1 else f"rank {rank}: {reason}"
