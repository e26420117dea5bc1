"""A plain Hugging Face folder from shards, without the network ever being whole on one rank.

Tensors are gathered one after another. The files are dealt out to the ranks, and each rank keeps the tensors of one of
its own files at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.distributed.ranks import Ranks
from unmask.models.folders import INDEX, WEIGHTS
from unmask.models.weights import CARRIED, SHARD_BYTES, carried_keys, carried_tensors, write_tensors
from unmask.training.sharded_model import SharedNetwork


def write_plain(network: SharedNetwork, ranks: Ranks, folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the weights in the released layout; all ranks call it. Return the files that this rank has written.

    Args:
        network: the sharded network, without adapter.
        ranks: all of them.
        folder: an existing folder that all ranks see.
        shard_bytes: largest size of a file (a single larger tensor still gets its own).
    """
    tensors: dict[str, Any] = dict(network.trained())
    carried = dict(carried_tensors(network.source, network.layout)) if ranks.first else {}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    files = list(_files(sizes, shard_bytes))
    number_of_files = len(files) + bool(carried_keys(network.source, network.layout))
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        path = folder / _file_name(number, number_of_files)
        weight_map.update(dict.fromkeys(names, path.name))
        own: dict[str, Tensor] = {}
        for name in names:
            whole = tensors[name].full_tensor() if hasattr(tensors[name], "full_tensor") else tensors[name]
            if number % ranks.size == ranks.rank:
                own[name] = whole.detach().cpu().contiguous()
        if own:
            write_tensors(own, path)
            written.append(path)
    if ranks.first and carried:
        path = folder / _file_name(len(files), number_of_files)
        write_tensors(carried, path)
        weight_map.update(dict.fromkeys(carried, path.name))
        written.append(path)
    if ranks.first and number_of_files > 1:
        total = sum(sizes.values()) + sum(tensor.numel() * tensor.element_size() for tensor in carried.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.append(folder / INDEX)
    return written


def write_carried(network: SharedNetwork, folder: Path) -> None:
    """Write beside the shards what the files of the network's source hold and the network does not."""
    carried = dict(carried_tensors(network.source, network.layout))
    if carried:
        write_tensors(carried, folder / CARRIED)


def _file_name(number: int, of: int) -> str:
    return WEIGHTS if of == 1 else f"model-{number + 1:05d}-of-{of:05d}.safetensors"


def _files(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Yield the names of each file: as many tensors, in order, as fit."""
    names: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names
