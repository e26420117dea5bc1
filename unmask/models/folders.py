"""Where a model or a LoRA adapter lives, and what its files promise. No torch: a wrong path is refused at once."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub  # which loads what is asked of it, when it is
from safetensors import SafetensorError, safe_open

from unmask.errors import ModelError
from unmask.parsing import ParseProblem, parse_json
from unmask.places import check_regular, read_bytes, user_path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHARDED = "sharded"  # folder of files that each hold one rank's parts of tensors
_SAMPLE = 2**12  # bytes read at the start, middle and end of each tensor
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What of a hub repository is fetched: configuration and tokenizer, and the weights where they are needed.
_LIGHT = ("config.json", GENERATION, "processor_config.json", "preprocessor_config.json", "*.jinja",
          "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Names of weights that other tools pickle.
_PICKLED = ("adapter_model*.bin", "pytorch_model*.bin", "model*.bin", "consolidated*.pth", "model*.pt", "model*.pth",
            "*.ckpt")  # fmt: skip


def find_folder(name: str, where: str = "checkpoint", weights: bool = True) -> Path:
    """Return the local folder that `name` stands for, downloading from the hub when it is a hub id.

    Args:
        name: a run directory (its newest checkpoint is taken), a folder with a config.json, or `owner/name`.
        where: the flag or field the name came from, for messages.
        weights: False downloads the configuration and the tokenizer alone.

    Raises:
        ModelError: no such folder, a folder that is no checkpoint, or a hub that does not answer.
    """
    path = _model_path(name, where)
    if path.is_dir():
        for candidate in candidates(path):
            if (candidate / "config.json").is_file():
                return candidate
        _refuse_adapter(path, name, where)
        remedy = f"give a folder with config.json and {WEIGHTS}, or a run directory with a checkpoint"
        if inside := _run_inside(path):
            remedy = f"did you mean {Path(name) / inside.name}?"
        raise ModelError(f"{where}: {name} is not a checkpoint: it has no config.json; {remedy}")
    if path.exists():
        raise ModelError(f"{where}: {name} is a file; give the folder that holds config.json and {WEIGHTS}")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name) or path.parent.is_dir():
        raise ModelError(f"{where}: no such folder: {path.absolute()} (a hub id has the form owner/name)")
    return _download(name, where, [*_LIGHT, *(_WEIGHTS if weights else ())])


def _model_path(name: str | Path, where: str) -> Path:
    path = user_path(name, where)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"{where}: {path}: safetensors opens no name that is not UTF-8; rename it") from None
    return path


def candidates(path: Path) -> tuple[Path, ...]:
    """Return where in a folder a model, adapter or tokenizer may be: a run's newest checkpoint, then the folder itself.

    So of a base model's folder in which somebody trained, what was trained is taken, and not the base.
    """
    newest = _newest_checkpoint(path)
    return (path,) if newest is None else (newest, path)


def _newest_checkpoint(path: Path) -> Path | None:
    """Return `latest`, or the last `step_N` where copying lost that link; None in a folder that is no run directory."""
    if (path / "latest").is_dir():
        return path / "latest"
    steps = [child for child in path.glob("step_*") if child.name[5:].isdecimal() and child.is_dir()]
    return max(steps, key=lambda child: int(child.name[5:]), default=None)


def choice_note(path: Path, taken: Path, file: str = "config.json") -> str:
    """Say which of several models (or adapters, by their `file`) in a folder was taken; "" where there is one."""
    newest = _newest_checkpoint(path)
    if newest is None or taken not in (newest, path):
        return ""
    if taken == newest and (path / file).is_file():
        return f"{path}: took the run's checkpoint {newest.resolve().name}, not the {file} beside it"
    if taken == newest:
        lost = f"{path}: took {newest.name}, the last one, since the link `latest` is missing"
        return "" if newest.name == "latest" else lost
    adapter = file != ADAPTER_CONFIG and (newest / ADAPTER_CONFIG).is_file()
    what = f"is an adapter: --adapter {path} adds it" if adapter else f"has no {file}"
    return f"{path}: took the {file} in it, not the run's checkpoint {newest.resolve().name}, which {what}"


def find_adapter(folder: str | Path) -> Path:
    """Return the adapter folder that a path (or a run directory) stands for; ModelError when it holds none."""
    path = _model_path(folder, "adapter")
    for candidate in candidates(path):
        if (candidate / ADAPTER_CONFIG).is_file() and (candidate / ADAPTER_WEIGHTS).is_file():
            return candidate
    raise ModelError(
        f"adapter: {path.absolute()} is no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        + (_pickle_note(path) or _pickle_note(path / "latest"))
    )


def _pickle_note(folder: Path) -> str:
    """Name pickled weights in a folder and what to do with them, as the end of a message; "" when there are none."""
    found = next((file.name for pattern in _PICKLED for file in sorted(folder.glob(pattern))), None)
    if found is None:
        return ""
    return (
        f"; {found} is a pickle, which is not read, since it may run code: open it where you trust it and save it "
        "again as safetensors (save_pretrained of transformers or PEFT does)"
    )


def _run_inside(path: Path) -> Path | None:
    """Return the first child that is a run directory with a checkpoint, whole model or adapter."""
    for child in sorted(path.iterdir()):
        if any((child / "latest" / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            return child
    return None


def _refuse_adapter(path: Path, name: str, where: str) -> None:
    for candidate in candidates(path):
        if (candidate / ADAPTER_CONFIG).is_file():
            base = read_json(candidate / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
            raise ModelError(
                f"{where}: {name} is an adapter, not a whole model; give `--checkpoint {base} --adapter {name}` "
                "(`unmask export` merges the two into one)"
            )


def _download(name: str, where: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: offline, gated, missing, interrupted
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{where}: {name} is neither a local folder nor available from the Hugging Face hub ({reason}); "
            "check the spelling, the network and `hf auth login`"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file; ModelError names the file when it is missing, cut short or not an object.

    A key that is given twice is refused, too: which of its values is meant is unknown.
    """
    try:
        values = parse_json(read_bytes(path), _read_object)
    except KeyError as error:
        raise ModelError(
            f"{path}: the key {error.args[0]!r} is given twice in one object, and which value is meant is unknown; "
            "take one of them out"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the checkpoint again") from None
    except ParseProblem as error:
        raise ModelError(f"{path}: not valid JSON ({error}); the file may be cut short, copy it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return values


def _read_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; KeyError of a key that is there twice."""
    made: dict[str, Any] = {}
    for key, value in members:
        if key in made:
            raise KeyError(key)
        made[key] = value
    return made


def read_generation(folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Return the values of a checkpoint's generation_config.json, those of an adapter's over them; {} without a file.

    Raises:
        ModelError: a file that is not valid, or whose `eos_token_id` is no id or list of ids.
    """
    paths = [place / GENERATION for place in (folder, adapter) if place is not None]
    values = {name: value for path in paths if path.is_file() for name, value in read_json(path).items()}
    end_ids(values)
    return values


def end_ids(generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an answer by the values of a generation_config.json; () where it does not say.

    Raises:
        ModelError: `eos_token_id` is no id, list of ids or null.
    """
    value = generation.get("eos_token_id")
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelError(f"{GENERATION}: eos_token_id: expected a token id, a list of them or null, got {value!r}")
    return tuple(ids)


@dataclass(frozen=True)
class Chunk:
    """The part of a tensor that one safetensors file holds; `offset` is where it begins in the whole tensor."""

    file: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a folder holds it, from the headers of its files.

    Attributes:
        dtype: safetensors' name, such as `BF16`.
        chunks: its parts, which do not overlap: one, or one from each rank that saved a part.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by key, after checking that all files are there and whole. Reads headers alone.

    The folder is one that transformers reads (`model.safetensors`, or several files and their index), or it has a
    folder `sharded` of the files that each rank of a run has written (torch's HuggingFaceStorageWriter).

    Raises:
        ModelError: no safetensors in the folder, a file missing or cut short, an index that disagrees, a tensor of
            which a part is missing.
    """
    if (folder / WEIGHTS).is_file():  # first, as transformers does
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        return _indexed_tensors(folder)
    elif (folder / SHARDED).is_dir():
        files = sorted((folder / SHARDED).glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{folder / SHARDED}: no safetensors; an earlier version wrote pickled shards, which are not read: "
                "export the checkpoint with that version"
            )
    else:
        raise ModelError(f"{folder}: not a checkpoint: neither {WEIGHTS} nor {INDEX} is there{_pickle_note(folder)}")
    parts: dict[str, list[tuple[str, Chunk]]] = {}
    for file in files:
        for key, part in _header(file).items():
            parts.setdefault(key, []).append(part)
    return {key: _joined(folder, key, entries) for key, entries in parts.items()}


def _indexed_tensors(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{folder / INDEX}: no weight_map; copy the checkpoint again")
    for file in weight_map.values():
        if not isinstance(file, str) or not _inside(file):
            raise ModelError(
                f"{folder / INDEX}: {file!r} is no file of its folder, and shards elsewhere are not read; copy the "
                "checkpoint again"
            )
    promised = set(weight_map.items())
    headers = {name: _header(folder / name) for name in sorted({name for _, name in promised})}
    stored = {(key, name) for name, header in headers.items() for key in header}
    if promised != stored:
        odd = min(promised ^ stored)[0]
        raise ModelError(f"{folder / INDEX}: disagrees with its shards about {odd!r}; copy the checkpoint again")
    return {key: _joined(folder, key, [part]) for header in headers.values() for key, part in header.items()}


def _inside(name: str) -> bool:
    """Say whether a name stays in the folder that it is of."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and name.isprintable()


def _header(file: Path) -> dict[str, tuple[str, Chunk]]:
    """Return (dtype, part) of each key of a safetensors file."""
    try:
        check_regular(file)
        with safe_open(file, framework="numpy") as opened:
            # torch.distributed.checkpoint writes here where each part begins; other files hold whole tensors.
            begins = parse_json((opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            header = {}
            for key in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(key)
                shape = tuple(part.get_shape())
                offset = tuple(begins[key]["saved_offsets"]) if begins else (0,) * len(shape)
                if len(offset) != len(shape) or not all(isinstance(start, int) and start >= 0 for start in offset):
                    raise ValueError(f"{key} begins at {offset}")
                header[key] = part.get_dtype(), Chunk(file, offset, shape)
            return header
    except FileNotFoundError:
        raise ModelError(f"{file}: this shard is missing; copy the checkpoint again") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); copy it again") from None


def _joined(folder: Path, key: str, parts: list[tuple[str, Chunk]]) -> StoredTensor:
    """Return one tensor from its parts; ModelError when they do not make a whole."""
    dtypes = {dtype for dtype, _ in parts}
    chunks = [chunk for _, chunk in parts]
    ends = [tuple(map(sum, zip(chunk.offset, chunk.shape, strict=True))) for chunk in chunks]
    shape = tuple(map(max, *ends)) if len(ends) > 1 else ends[0]
    filled = tuple(chunk for chunk in chunks if prod(chunk.shape)) or tuple(chunks[:1])
    alike = len(dtypes) == 1 and len({len(end) for end in ends}) == 1
    # Parts that do not overlap and are as large as the whole together leave no hole.
    if not alike or sum(prod(chunk.shape) for chunk in chunks) != prod(shape) or _overlap(filled):
        raise ModelError(
            f"{folder}: the parts of {key!r} do not make a whole: a rank's file is missing or there twice; copy the "
            "checkpoint again"
        )
    return StoredTensor(shape, dtypes.pop(), filled)


def _overlap(chunks: tuple[Chunk, ...]) -> bool:
    ordered = sorted(chunks, key=lambda chunk: chunk.offset)
    for number, one in enumerate(ordered[:-1], start=1):
        for other in itertools.islice(ordered, number, None):
            if other.offset[0] >= one.offset[0] + one.shape[0]:
                break
            sides = zip(one.offset, one.shape, other.offset, other.shape, strict=True)
            if all(start < begin + width and begin < start + length for start, length, begin, width in sides):
                return True
    return False


def weights_fingerprint(folder: Path) -> str:
    """Return a hash that distinguishes one model's weights from another's, in little time, wherever the folder lies.

    It covers config.json, the name, shape and type of every tensor, and 4 KiB at the start, middle and end of each:
    what training or merging an adapter changes shows there, whichever tensors it touches.

    Raises:
        ModelError: as `stored_tensors`.
    """
    digest = hashlib.blake2b(digest_size=16)
    if (folder / "config.json").is_file():
        digest.update((folder / "config.json").read_bytes())
    for file in sorted({chunk.file for stored in stored_tensors(folder).values() for chunk in stored.chunks}):
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        # Without a buffer, which would read on past every sample.
        with file.open("rb", buffering=0) as opened:
            for start, end in _samples(opened):
                opened.seek(start)
                digest.update(opened.read(end - start))
    return digest.hexdigest()


def base_note(adapter: Path, checkpoint: Path) -> str:
    """Return a warning where an adapter was trained over other weights than a checkpoint's; else, or not known, empty.

    What an adapter was trained over stands in the state.json of the run that made it.
    """
    try:
        base = parse_json(read_bytes(adapter / "state.json"), strict=False)["identity"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if base is None or base == weights_fingerprint(checkpoint):
        return ""
    return (
        f"{adapter} was trained over other weights than those of {checkpoint}; give the checkpoint that it was trained "
        "over, unless another was meant"
    )


def _samples(file: FileIO) -> list[tuple[int, int]]:
    """Return which bytes of a safetensors file tell it from another: its header and parts of each tensor."""
    data = 8 + int.from_bytes(file.read(8), "little")
    header = parse_json(file.read(data - 8), strict=False)
    samples = [(0, data)]
    for begin, end in sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"):
        starts = (begin, (begin + end - _SAMPLE) // 2, end - _SAMPLE)
        if end - begin <= len(starts) * _SAMPLE:
            samples.append((data + begin, data + end))
        else:
            samples += [(data + start, data + start + _SAMPLE) for start in starts]
    return samples
