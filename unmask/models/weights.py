"""Weights in and out of safetensors folders, a tensor at a time, with exactly the keys that the network has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.errors import ModelError
from unmask.models.family import PLAIN, FileLayout
from unmask.models.folders import INDEX, WEIGHTS, is_plain, weight_files
from unmask.models.sharded_folder import read_sharded, stored_shapes

SHARD_BYTES = 5 * 10**9
CARRIED = "carried.safetensors"  # beside the shards of several ranks: what is none of the network's


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Yield every wanted (key, tensor) of a folder, shard by shard; of safetensors at most one is held at a time."""
    if not is_plain(folder):
        yield from ((key, tensor) for key, tensor in read_sharded(folder).items() if wanted(key))
        return
    for file, keys in _keys_by_file(folder, wanted).items():
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                yield key, opened.get_tensor(key)


def load_weights(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, device: Any, layout: FileLayout = PLAIN
) -> None:
    """Fill a network built on the meta device from a folder, without ever holding two copies of it.

    Args:
        model: the network; every parameter is replaced.
        folder: a folder with safetensors.
        dtype: dtype of floating parameters; None = as stored.
        device: where the parameters go.
        layout: what the folder may hold beside the network.

    Raises:
        ModelError: a key too many or too few, or a shape that does not fit; the first one is named.
    """
    for key, tensor in _fitting_tensors(model, folder, layout):
        moved = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        model.load_state_dict({key: moved}, strict=False, assign=True)


@torch.no_grad()
def copy_weights(model: nn.Module, folder: Path, layout: FileLayout = PLAIN) -> None:
    """Copy a folder's values into a network's existing parameters, which an optimizer may hold; raises ModelError."""
    places = model.state_dict()
    for key, tensor in _fitting_tensors(model, folder, layout):
        places[key].copy_(tensor)


def carried_keys(folder: Path | None, layout: FileLayout) -> list[str]:
    """Return the keys of `carried_tensors`, without reading a tensor."""
    if folder is None:
        return []
    if is_plain(folder):
        return [key for key in weight_files(folder) if layout.passthrough(key)]
    if not (folder / CARRIED).is_file():
        return []
    with safe_open(folder / CARRIED, framework="pt") as opened:
        return list(opened.keys())


def carried_tensors(folder: Path | None, layout: FileLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder that are not the network's and belong into every copy of it, as stored."""
    if folder is None:
        return
    if not is_plain(folder):
        if (folder / CARRIED).is_file():
            with safe_open(folder / CARRIED, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    yield key, opened.get_tensor(key)
        return
    yield from read_tensors(folder, layout.passthrough)


def _check_twin(folder: Path, key: str, twin: str, tensor: Tensor, part: tuple[slice, ...] = ()) -> None:
    """Raise ModelError unless a tensor that repeats another, or a slice of it, is equal to that of the other."""
    file = weight_files(folder).get(twin) if is_plain(folder) else None
    if file is not None:
        with safe_open(file, framework="pt") as opened:
            if torch.equal(opened.get_slice(twin)[part or ...], tensor):
                return
    raise ModelError(
        f"{folder}: {key} is not equal to {twin}, which it is tied to; this network holds one tensor for both, so tie "
        "them (transformers: tie_weights) before saving"
    )


def _fitting_tensors(model: nn.Module, folder: Path, layout: FileLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder that the network has, checked to be exactly its set."""
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    missing = dict.fromkeys(wanted)
    for key, tensor in read_tensors(folder, lambda key: not layout.passthrough(key)):
        twin = layout.tied_to(key)
        if twin in wanted:
            _check_twin(folder, key, twin, tensor)
            continue
        _check_fit(key, tuple(tensor.shape), wanted, folder)
        del missing[key]
        yield key, tensor
    _check_none_missing(missing, folder)


def read_slices(
    shapes: Mapping[str, torch.Size],
    places: Mapping[str, tuple[slice, ...]],
    folder: Path,
    layout: FileLayout = PLAIN,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, slice of the stored tensor) for every key, reading no more than the slices from the disk.

    Args:
        shapes: of each tensor of the network, whole.
        places: the wanted slice of each; an empty one is not read and not yielded.
        folder: a folder with safetensors.
        layout: what the folder may hold beside the network.

    Raises:
        ModelError: a key too many or too few, or a shape that does not fit; the first one is named.
    """
    missing = dict.fromkeys(shapes)
    for file, keys in _keys_by_file(folder).items():
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                if layout.passthrough(key):
                    continue
                stored = opened.get_slice(key)
                twin = layout.tied_to(key)
                if twin is not None and twin in shapes:
                    part = places[twin]
                    if all(side.stop > side.start for side in part):
                        _check_twin(folder, key, twin, stored[part or ...], part)
                    continue
                _check_fit(key, tuple(stored.get_shape()), shapes, folder)
                del missing[key]
                if all(part.stop > part.start for part in places[key]):
                    yield key, stored[places[key] or ...]
    _check_none_missing(missing, folder)


def check_tensors(model: nn.Module, folder: Path, layout: FileLayout = PLAIN) -> None:
    """Check that a folder has the tensors of a network, from its headers alone: no weight is read.

    That tied tensors which are stored twice are equal is left to loading.

    Raises:
        ModelError: as `load_weights`.
    """
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    missing = dict.fromkeys(shapes)
    for key, shape in _stored_shapes(folder):
        if not layout.passthrough(key) and layout.tied_to(key) not in shapes:
            _check_fit(key, shape, shapes, folder)
            del missing[key]
    _check_none_missing(missing, folder)


def _stored_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if not is_plain(folder):
        yield from stored_shapes(folder).items()
        return
    for file, keys in _keys_by_file(folder).items():
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                yield key, tuple(opened.get_slice(key).get_shape())


def _keys_by_file(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[Path, list[str]]:
    by_file: dict[Path, list[str]] = {}
    for key, file in weight_files(folder).items():
        if wanted(key):
            by_file.setdefault(file, []).append(key)
    return by_file


def _check_fit(key: str, shape: tuple[int, ...], wanted: Mapping[str, torch.Size], folder: Path) -> None:
    if key not in wanted:
        raise ModelError(
            f"{folder}: tensor {key!r} has no place in this network; is config.json that of another model?"
        )
    if shape != tuple(wanted[key]):
        raise ModelError(f"{folder}: {key} has shape {shape}, config.json says {tuple(wanted[key])}")


def _check_none_missing(missing: Mapping[str, None], folder: Path) -> None:
    if missing:
        raise ModelError(
            f"{folder}: tensor {next(iter(missing))!r} is missing ({len(missing)} in all); copy the checkpoint again, "
            "or take what is missing from the one that it was made from"
        )


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, readable by whom the user's other files are; its own library makes it private."""
    path.touch()
    mode = path.stat().st_mode  # what the umask, or the folder's default permissions, give a new file
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def save_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write tensors to `model.safetensors`, or to numbered shards with an index when they exceed one shard.

    Args:
        tensors: (key, tensor) pairs in file order; consumed once, so that a generator need not hold them all.
        folder: an existing folder.
        shard_bytes: largest size of a shard, in bytes (a single larger tensor still gets its own).

    Returns:
        the files written, index included.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.part"
        write_tensors(pending, path)
        shards.append((path, list(pending)))
        pending.clear()

    try:
        for key, tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            if pending and size + nbytes > shard_bytes:
                flush()
                size = 0
            pending[key] = tensor.detach().cpu().contiguous()
            size += nbytes
            total += nbytes
        flush()
    except BaseException:  # a full disk or an interrupt leaves nothing half-written behind
        for path in folder.glob("shard-*.part"):
            path.unlink()
        raise
    if len(shards) == 1:
        return [shards[0][0].rename(folder / WEIGHTS)]
    written, weight_map = [], {}
    for number, (path, keys) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written.append(path.rename(folder / name))
        weight_map.update(dict.fromkeys(keys, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*written, folder / INDEX]
