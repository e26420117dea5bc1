"""Weights in and out of safetensors folders, a tensor at a time, with exactly the keys that the network has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.errors import ModelError
from unmask.models.family import PLAIN_LAYOUT, FileLayout
from unmask.models.folders import INDEX, SHARDED, WEIGHTS, StoredTensor, stored_tensors
from unmask.models.wrappers import misplaced
from unmask.places import naming

SHARD_BYTES = 5 * 10**9
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

T = TypeVar("T")
Place = tuple[slice, ...]  # a part of a tensor, a slice a dimension; () is a number, whole


@dataclass(frozen=True)
class Piece:
    """A process's part of one named tensor of the whole network.

    Attributes:
        local: the part itself, sharing memory with the network; may be empty.
        shape: of the whole tensor.
        place: where the part lies in it.
        pack: takes the part's values where `local` holds codes of them; None = they are copied there.
    """

    local: Tensor
    shape: torch.Size
    place: Place
    pack: Callable[[Tensor], object] | None = None


def whole_piece(tensor: Tensor) -> Piece:
    """Return a tensor that this process holds whole."""
    return Piece(tensor, tensor.shape, whole_place(tensor.shape))


def whole_place(shape: torch.Size) -> Place:
    """Return the place of all of a tensor."""
    return tuple(slice(0, length) for length in shape)


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Yield every wanted (key, tensor) of a folder, whole, file by file; of each file one tensor is held at a time."""
    return _read({key: stored for key, stored in stored_tensors(folder).items() if wanted(key)}, {})


def read_slices(
    shapes: Mapping[str, torch.Size], places: Mapping[str, Place], folder: Path, layout: FileLayout = PLAIN_LAYOUT
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, slice of the stored tensor) for every key, reading no more than the slices from the disk.

    Args:
        shapes: of each tensor of the network, whole.
        places: the wanted slice of each; an empty one is not read and not yielded.
        layout: what the folder may hold beside the network.

    Raises:
        ModelError: a key too many or too few, or a shape that does not fit, before anything is read; a tensor that is
            tied to another and not equal to it. The first one is named.
    """
    stored = stored_tensors(folder)
    owners = _check(shapes, stored, folder, layout)
    source = {owner: owner for owner in owners.values() if owner in stored}  # a tensor's own key comes first
    for key, owner in owners.items():
        source.setdefault(owner, key)
    wanted = {key: places[owner] for key, owner in owners.items()}
    wanted = {key: place for key, place in wanted.items() if all(side.stop > side.start for side in place)}
    for key, part in _read({key: stored[key] for key in wanted}, wanted):
        other = source[owners[key]]
        if other == key:
            yield owners[key], part
        elif not _same_values(next(_read({other: stored[other]}, {other: wanted[key]}))[1], part):
            raise ModelError(
                f"{folder}: {key} is not equal to {other}, which it is tied to; this network holds one tensor for "
                "both, so tie them (transformers: tie_weights) before saving, or correct config.json"
            )


def _same_values(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def _read(stored: Mapping[str, StoredTensor], places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, part of the tensor), whole without a place. No more files are open than one tensor needs."""
    by_files: dict[tuple[Path, ...], list[str]] = {}
    for key, entry in stored.items():
        by_files.setdefault(tuple(chunk.file for chunk in entry.chunks), []).append(key)
    for files, keys in by_files.items():
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            for key in keys:
                yield key, _assemble(key, stored[key], places.get(key), opened)


def _assemble(key: str, stored: StoredTensor, place: Place | None, opened: list[Any]) -> Tensor:
    """Return a part of a tensor from the chunks that hold some of it."""
    if len(stored.chunks) == 1:
        return opened[0].get_tensor(key) if not place else opened[0].get_slice(key)[place]
    place = place or tuple(slice(0, length) for length in stored.shape)
    part: Tensor | None = None
    for chunk, file in zip(stored.chunks, opened, strict=True):
        ends = [start + length for start, length in zip(chunk.offset, chunk.shape, strict=True)]
        begin = [max(side.start, start) for side, start in zip(place, chunk.offset, strict=True)]
        end = [min(side.stop, stop) for side, stop in zip(place, ends, strict=True)]
        if any(first >= last for first, last in zip(begin, end, strict=True)):
            continue
        source = tuple(slice(b - s, e - s) for b, e, s in zip(begin, end, chunk.offset, strict=True))
        values = file.get_slice(key)[source]
        if part is None:
            part = torch.empty([side.stop - side.start for side in place], dtype=values.dtype)
        part[tuple(slice(b - p.start, e - p.start) for b, e, p in zip(begin, end, place, strict=True))] = values
    assert part is not None  # the chunks make a whole
    return part


def _check(
    shapes: Mapping[str, torch.Size], stored: Mapping[str, StoredTensor], folder: Path, layout: FileLayout
) -> dict[str, str]:
    """Return stored key → the network's key whose values it holds, in the folder's order; ModelError unless all are."""
    owners: dict[str, str] = {}
    for key, entry in stored.items():
        if not layout.holds(key, shapes):
            where = misplaced(stored, lambda name: layout.holds(name, shapes))
            where = where or f"tensor {key!r} has no place in this network; is config.json that of another model?"
            raise ModelError(f"{folder}: {where}")
        owner = key if key in shapes else layout.tied_to(key)
        if owner is None or owner not in shapes:  # passed through
            continue
        if entry.shape != tuple(shapes[owner]):
            in_parts = entry.chunks[0].file.parent.name == SHARDED
            raise ModelError(
                f"{folder}: {key} has shape {entry.shape}, config.json says {tuple(shapes[owner])}"
                + f"; is the file of a rank missing in {SHARDED}/?" * in_parts
            )
        owners[key] = owner
    found = set(owners.values())
    missing = [key for key in shapes if key not in found]
    if missing:
        raise ModelError(
            f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all); copy the checkpoint again, or take "
            "what is missing from the one that it was made from"
        )
    return owners


def check_tensors(model: nn.Module, folder: Path, layout: FileLayout = PLAIN_LAYOUT) -> None:
    """Check that a folder has the tensors of a network, from its headers alone: no weight is read.

    That tied tensors which are stored twice are equal is left to loading. Raises as `read_slices`.
    """
    _check({key: tensor.shape for key, tensor in model.state_dict().items()}, stored_tensors(folder), folder, layout)


@torch.no_grad()
def fill(pieces: Iterable[tuple[str, Piece]], folder: Path, layout: FileLayout = PLAIN_LAYOUT) -> None:
    """Copy a folder's values into existing tensors, which an optimizer may hold; raises as `read_slices`.

    On another device each tensor is brought there as it is read, so that the host holds one at a time. `pieces` are
    (key, piece) of all tensors that the folder must have; several may have one key.
    """
    by_key: dict[str, list[Piece]] = {}
    for key, piece in pieces:
        by_key.setdefault(key, []).append(piece)
    shapes = {key: held[0].shape for key, held in by_key.items()}
    places = {key: held[0].place for key, held in by_key.items()}
    for key, part in read_slices(shapes, places, folder, layout):
        for piece in by_key[key]:
            (piece.pack or piece.local.copy_)(part)


def base_tensors(tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield the tensors of a network, an adapter attached or not, by the keys that the bare network's files have.

    An adapter's own are left out. PEFT moves an adapted layer to `base_layer`, and a module that is trained whole has
    its start in the files too.
    """
    for name, tensor in tensors:
        if ".lora_" not in name:
            for wrapped in (".base_layer.", ".original_module.", ".modules_to_save.default."):
                name = name.replace(wrapped, ".")
            yield name, tensor


def set_dtypes(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, layout: FileLayout = PLAIN_LAYOUT
) -> nn.Module:
    """Return a network on the meta device with every tensor in a dtype; None = in that of its file."""
    if dtype is not None:
        return model.to(dtype)
    state, every = model.state_dict(), stored_tensors(folder)
    for key, stored in every.items():
        owner = key if key in state else layout.tied_to(key)
        if owner in state and (owner == key or owner not in every):
            if stored.dtype not in _DTYPES:
                raise ModelError(f"{folder}: {key} has dtype {stored.dtype}, which no network here computes with")
            model.load_state_dict({owner: state[owner].to(_DTYPES[stored.dtype])}, strict=False, assign=True)
    return model


def allocate_whole(model: nn.Module, device: Any) -> None:
    """Give a network on the meta device memory, its values undefined; ModelError where a GPU has too little."""
    try:
        model.to_empty(device=device)
    except torch.OutOfMemoryError:
        size = sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))
        raise ModelError(
            f"the weights of the model, {size / 1e9:.1f} GB, do not fit on {device}; end what else runs there, take a "
            "narrower dtype (bfloat16), or share the model among several devices (--nproc-per-node)"
        ) from None


def load_weights(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, device: Any, layout: FileLayout = PLAIN_LAYOUT
) -> None:
    """Fill a network built on the meta device from a folder, a tensor at a time.

    Every parameter is replaced; floating ones get `dtype`, None = as stored. Raises as `read_slices`.
    """
    check_tensors(model, folder, layout)
    allocate_whole(set_dtypes(model, folder, dtype, layout), device)
    fill(((key, whole_piece(tensor)) for key, tensor in model.state_dict().items()), folder, layout)


def passthrough_tensors(folder: Path | None, layout: FileLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder that are not the network's and belong into every copy of it, as stored."""
    return iter(()) if folder is None else read_tensors(folder, layout.passthrough)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, readable by whom the user's other files are; its own library makes it private."""
    path.touch()
    mode = path.stat().st_mode  # what the umask, or the folder's default permissions, give a new file
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # how its library reports the disk's errors, without the file's name
        raise SafetensorError(f"{path.name}: {error}") from None
    path.chmod(mode)


def save_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write tensors to `model.safetensors`, or to numbered shards with an index when they exceed one shard.

    Args:
        tensors: (key, tensor) pairs in file order; consumed once, so that a generator need not hold them all.
        folder: an existing folder.
        shard_bytes: largest size of a shard (a single larger tensor still gets its own).

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
    with naming(folder / INDEX):
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*written, folder / INDEX]
