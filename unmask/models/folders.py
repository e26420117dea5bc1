"""Where a model or a LoRA adapter lives, and what its files promise. Needs no torch: a wrong path is told at once."""

from __future__ import annotations

import hashlib
import json
import re
from io import FileIO
from pathlib import Path
from typing import Any

from unmask.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHARDED = "sharded"  # folder of a checkpoint that several ranks have written, each its shards
_SAMPLE = 2**12  # bytes read at the start, middle and end of each tensor
_STRIDE = 2**18  # bytes between two samples of a file whose tensors are not listed
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What of a hub repository is fetched: configuration and tokenizer, and the weights where they are needed.
_LIGHT = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "*.jinja",
          "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def find_folder(name: str, where: str = "checkpoint", weights: bool = True) -> Path:
    """Return the local folder that `name` stands for, downloading from the hub when it is a hub id.

    Args:
        name: a folder with a config.json, a run directory (its `latest` checkpoint is taken), or `owner/name`.
        where: the flag or field the name came from, for messages.
        weights: False downloads the configuration and the tokenizer alone.

    Raises:
        ModelError: no such folder, a folder that is no checkpoint, or a hub that does not answer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in (path, path / "latest"):
            if (candidate / "config.json").is_file():
                return candidate
        _refuse_adapter(path, name, where)
        inside = _run_inside(path)
        remedy = (
            f"did you mean {Path(name) / inside.name}?"
            if inside
            else (f"give a folder with config.json and {WEIGHTS}, or a run directory with a checkpoint")
        )
        raise ModelError(f"{where}: {name} is not a checkpoint: it has no config.json; {remedy}")
    if path.exists():
        raise ModelError(f"{where}: {name} is a file; give the folder that holds config.json and {WEIGHTS}")
    looks_local = name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name) or path.parent.is_dir()
    if looks_local:
        raise ModelError(f"{where}: no such folder: {path.absolute()} (a hub id has the form owner/name)")
    return _download(name, where, [*_LIGHT, *(_WEIGHTS if weights else ())])


def find_adapter(folder: str | Path) -> Path:
    """Return the adapter folder that a path (or a run directory) stands for; ModelError when it holds none."""
    path = Path(folder).expanduser()
    for candidate in (path, path / "latest"):
        if (candidate / ADAPTER_CONFIG).is_file() and (candidate / ADAPTER_WEIGHTS).is_file():
            return candidate
    raise ModelError(f"adapter: {path.absolute()} is no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")


def _run_inside(path: Path) -> Path | None:
    """Return the first child that is a run directory with a checkpoint, whole model or adapter."""
    for child in sorted(path.iterdir()):
        if any((child / "latest" / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            return child
    return None


def _refuse_adapter(path: Path, name: str, where: str) -> None:
    for candidate in (path, path / "latest"):
        if (candidate / ADAPTER_CONFIG).is_file():
            base = read_json(candidate / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
            raise ModelError(
                f"{where}: {name} is an adapter, not a whole model; give `--checkpoint {base} --adapter {name}` "
                "(`unmask export` merges the two into one)"
            )


def _download(name: str, where: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: offline, gated, missing, interrupted
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{where}: {name} is neither a local folder nor available from the Hugging Face hub ({reason}); "
            "check the spelling, the network and `hf auth login`"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file; ModelError names the file when it is missing, cut short or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the checkpoint again") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); the file may be cut short, copy it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return values


def read_generation(folder: Path) -> dict[str, Any]:
    """Return the values of a checkpoint's generation_config.json; {} where there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def is_plain(folder: Path) -> bool:
    """Say whether a folder's weights are to be read as safetensors; else several ranks have written their shards."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() or not (folder / SHARDED).is_dir()


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each stored tensor by key, after checking that every file is whole.

    Raises:
        ModelError: no safetensors in the folder, a shard missing, a file cut short, or an index that disagrees.
    """
    if (folder / WEIGHTS).is_file():  # first, as transformers does
        return dict.fromkeys(_keys(folder / WEIGHTS), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder}: not a checkpoint: neither {WEIGHTS} nor {INDEX} is there")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{folder / INDEX}: no weight_map; copy the checkpoint again")
    promised = {(key, str(file)) for key, file in weight_map.items()}
    stored = {(key, name) for name in sorted({name for _, name in promised}) for key in _keys(folder / name)}
    if promised != stored:
        odd = min(promised ^ stored)[0]
        raise ModelError(f"{folder / INDEX}: disagrees with its shards about {odd!r}; copy the checkpoint again")
    return {key: folder / name for key, name in sorted(stored, key=lambda entry: entry[::-1])}


def weights_fingerprint(folder: Path) -> str:
    """Return a hash that tells one model's weights from another's in little time, wherever the folder lies.

    It covers config.json, the name, shape and type of every tensor, and 4 KiB at the start, middle and end of each:
    what training or merging an adapter changes shows there, whichever tensors it touches. Of shards that ranks have
    written, whose tensors no header lists, it covers 4 KiB in each 256 KiB.

    Raises:
        ModelError: as `weight_files`.
    """
    digest = hashlib.blake2b(digest_size=16)
    if (folder / "config.json").is_file():
        digest.update((folder / "config.json").read_bytes())
    plain = is_plain(folder)
    for shard in sorted(set(weight_files(folder).values() if plain else (folder / SHARDED).iterdir())):
        size = shard.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        # Without a buffer, which would read on past every sample.
        with shard.open("rb", buffering=0) as file:
            for start, end in _tensor_samples(file) if plain else _spread_samples(size):
                file.seek(start)
                digest.update(file.read(end - start))
    return digest.hexdigest()


def base_note(adapter: Path, checkpoint: Path) -> str:
    """Return a warning where an adapter was trained over other weights than a checkpoint's; else, or not known, empty.

    Args:
        adapter: from `find_adapter`. What it was trained over stands in the state.json of the run that made it.
        checkpoint: folder of the base that it is to be applied to.
    """
    try:
        base = json.loads((adapter / "state.json").read_text(encoding="utf-8"))["identity"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if base is None or base == weights_fingerprint(checkpoint):
        return ""
    return (
        f"{adapter} was trained over other weights than those of {checkpoint}; give the checkpoint that it was trained "
        "over, unless another was meant"
    )


def _tensor_samples(file: FileIO) -> list[tuple[int, int]]:
    """Return which bytes of a safetensors file tell it from another: its header and parts of each tensor."""
    data = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(data - 8))
    samples = [(0, data)]
    for begin, end in sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"):
        starts = (begin, (begin + end - _SAMPLE) // 2, end - _SAMPLE)
        if end - begin <= len(starts) * _SAMPLE:
            samples.append((data + begin, data + end))
        else:
            samples += [(data + start, data + start + _SAMPLE) for start in starts]
    return samples


def _spread_samples(size: int) -> list[tuple[int, int]]:
    starts = {*range(0, size, _STRIDE), max(0, size - _SAMPLE)}
    return [(start, min(start + _SAMPLE, size)) for start in sorted(starts)]


def _keys(shard: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise ModelError(f"{shard}: this shard is missing; copy the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard}: not a whole safetensors file ({error}); copy it again") from None
