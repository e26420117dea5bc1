"""Shards from and to files: each rank reads the slices that it keeps and writes the parts that it has, nothing else.

A network is built and sharded on the meta device, so that memory is taken for shards only; then each shard is filled
(`models.weights.fill` of `shard.pieces`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
from torch.distributed.checkpoint.api import CheckpointException

from unmask.distributed.ranks import Meshes, Ranks
from unmask.distributed.shard import pieces
from unmask.errors import TrainingError
from unmask.models.lora.files import is_trained
from unmask.models.weights import SHARD_BYTES


def allocate(model: nn.Module, device: torch.device, ranks: Ranks, remedy: str) -> None:
    """Give the shards of a network on the meta device memory, its values undefined.

    Raises:
        TrainingError: the device has not enough memory; the message ends in `remedy`.
    """
    try:
        model.to_empty(device=device)
    except torch.OutOfMemoryError:
        raise TrainingError(f"rank {ranks.rank}: the shards of the model do not fit on {device}; {remedy}") from None


@torch.no_grad()
def load_tensors(model: nn.Module, meshes: Meshes, whole: Iterable[tuple[str, Tensor]]) -> None:
    """Fill shards from whole tensors by name, for example freshly drawn ones; others stay as they are."""
    held = dict(pieces(model, meshes))
    for name, tensor in whole:
        piece = held[name]
        if piece.local.numel():
            piece.local.copy_(tensor[piece.place] if piece.place else tensor)


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
            raise
        return disk_problem(ranks, rank, cause)
    return None


def disk_problem(ranks: Ranks, rank: int, error: BaseException) -> str:
    """Return what a failed write says, and on which rank where there are several."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return reason if ranks.size == 1 else f"rank {rank}: {reason}"
