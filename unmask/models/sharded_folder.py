"""A checkpoint folder that several ranks have written: torch.distributed.checkpoint's files below `sharded/`."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from unmask.models.folders import SHARDED

MODEL = "model/"  # the network's tensors are named MODEL + state-dict key


def load_alone(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill named tensors from a sharded checkpoint in this process alone, without a process group."""
    from torch.distributed.checkpoint import FileSystemReader, load

    with warnings.catch_warnings():  # that there is no process group, which is what is wanted
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=FileSystemReader(folder / SHARDED), no_dist=True)


def stored_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every whole tensor of a sharded checkpoint by name."""
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(folder / SHARDED).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}  # pyright: ignore


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the network's tensors of a sharded checkpoint; reads no weights."""
    sizes = stored_sizes(folder).items()
    return {name.removeprefix(MODEL): tuple(size) for name, (size, _) in sizes if name.startswith(MODEL)}


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """Return the network's tensors of a sharded checkpoint, whole, on the host; needs no process group."""
    sizes = {name: entry for name, entry in stored_sizes(folder).items() if name.startswith(MODEL)}
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes.items()}
    load_alone(tensors, folder)
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}
