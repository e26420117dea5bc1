"""Sharded loading: each rank reads from the safetensors files the slices that it keeps, and nothing else.

The network is built and sharded on the meta device, so that memory is taken for shards only; then each shard is filled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from unmask.distributed.mesh import Meshes
from unmask.distributed.ranks import Ranks
from unmask.distributed.shard import Piece, pieces, whole_view
from unmask.errors import TrainingError
from unmask.models.family import PLAIN, FileLayout
from unmask.models.folders import SHARDED, is_plain
from unmask.models.lora.files import is_trained
from unmask.models.sharded_folder import MODEL
from unmask.models.weights import read_slices


def allocate(model: nn.Module, device: torch.device, ranks: Ranks, remedy: str) -> None:
    """Give the shards of a network on the meta device memory, its values undefined.

    Raises:
        TrainingError: the device has not enough memory; the message ends in `remedy`.
    """
    try:
        model.to_empty(device=device)
    except torch.OutOfMemoryError:
        raise TrainingError(f"rank {ranks.rank}: the shards of the model do not fit on {device}; {remedy}") from None


def load_folder(model: nn.Module, meshes: Meshes, folder: Path, layout: FileLayout = PLAIN) -> None:
    """Fill the shards of a network from a folder's safetensors; an adapter's tensors are left as they are.

    Args:
        model: sharded, its memory allocated, an adapter attached or not.
        meshes: the arrangement of ranks.
        folder: the weights of the network without adapter.
        layout: what the folder may hold beside the network.

    Raises:
        ModelError: a key too many or too few, or a shape that does not fit.
    """
    if not is_plain(folder):
        _load_shards(model, meshes, folder)
        return
    copies: dict[str, list[Piece]] = {}
    for name, piece in pieces(model, meshes):
        key = file_key(name)
        if key is not None:
            copies.setdefault(key, []).append(piece)
    shapes = {key: held[0].shape for key, held in copies.items()}
    places = {key: held[0].place for key, held in copies.items()}
    for key, part in read_slices(shapes, places, folder, layout):
        for piece in copies[key]:
            _copy(piece, part)


@torch.no_grad()
def _load_shards(model: nn.Module, meshes: Meshes, folder: Path) -> None:
    """Fill shards from a checkpoint that other ranks have written, however many; all ranks call it."""
    from torch.distributed.checkpoint import FileSystemReader, load

    wanted: dict[str, Tensor] = {}
    again: list[tuple[Tensor, str]] = []
    for name, tensor in model.state_dict().items():
        key = file_key(name)
        if key is None:
            continue
        view = whole_view(name, tensor, model, meshes)
        if MODEL + key in wanted:
            again.append((view, MODEL + key))
        else:
            wanted[MODEL + key] = view
    load(wanted, storage_reader=FileSystemReader(folder / SHARDED))
    for view, key in again:
        view.copy_(wanted[key])


def load_tensors(model: nn.Module, meshes: Meshes, whole: Iterable[tuple[str, Tensor]]) -> None:
    """Fill shards from whole tensors by name, for example freshly drawn ones; others stay as they are."""
    own = dict(pieces(model, meshes))
    for name, tensor in whole:
        _copy(own[name], tensor[own[name].place] if own[name].place else tensor)


def whole_adapter(model: nn.Module) -> nn.Module:
    """Return a copy of an adapted network on the meta device whose adapter alone is there, on the host, all zeros.

    An adapter is small beside its network: this is the go-between of files, which hold whole matrices, and shards.
    """
    adapter = copy.deepcopy(model)
    for name, parameter in list(adapter.named_parameters()):
        if is_trained(name):
            owner, _, own = name.rpartition(".")
            value = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
            setattr(adapter.get_submodule(owner), own, value)
    return adapter


def adapter_tensors(adapter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (state-dict key, tensor) of what an adapter trains."""
    return ((name, parameter) for name, parameter in adapter.named_parameters() if is_trained(name))


@torch.no_grad()
def _copy(piece: Piece, part: Tensor) -> None:
    if piece.local.numel():
        piece.local.copy_(part)


def file_key(name: str) -> str | None:
    """Return the key under which the file of the bare network holds a tensor; None for a tensor of an adapter.

    PEFT moves an adapted layer to `base_layer`, and a module that is trained whole has its start in the file too.
    """
    if ".lora_" in name:
        return None
    for wrapped in (".base_layer.", ".original_module.", ".modules_to_save.default."):
        name = name.replace(wrapped, ".")
    return name
