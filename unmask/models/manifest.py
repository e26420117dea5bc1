"""A checkpoint's manifest, the size and CRC-32 of each of its files, and the check of the files that are read."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from unmask.errors import ModelError
from unmask.models.folders import ADAPTER_CONFIG, INDEX, SHARDED
from unmask.parsing import parse_json
from unmask.places import read_bytes

MANIFEST = "manifest.json"
_BESIDE_WEIGHTS = ("config.json", ADAPTER_CONFIG, "tokenizer.json")  # compared where they are there
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@contextlib.contextmanager
def intact(folder: Path | None, check: bool = True) -> Iterator[None]:
    """Context that compares a model's or adapter's files with the manifest of the run that wrote them, if there is one.

    That is done beside what the context does, loading, and has an end when the context has: what was loaded is not used
    before. The optimizer's files, which only a resume reads, are left out, and so are settings that people edit: the
    chat template, generation_config.json, tokenizer_config.json.

    Raises:
        ModelError: a file is missing, too short or changed, in place of what loading it may have raised.
    """
    if folder is None or not check or not (folder / MANIFEST).is_file():
        yield
        return
    with ThreadPoolExecutor(1, "manifest") as beside:
        checked = beside.submit(_check_model, folder)
        try:
            yield
        except Exception:
            checked.result()
            raise
        checked.result()


def _check_model(folder: Path) -> None:
    try:
        files = read_manifest(folder)[1]
    except _UNREADABLE:
        if not (folder / "state.json").is_file():
            return  # another tool's file of that name
        damage = f"is torn: its {MANIFEST} is unreadable"
    else:
        damage = find_damage(folder, {name: entry for name, entry in files.items() if _is_model(folder, name)})
    if damage is not None:
        raise ModelError(
            f"{folder.resolve()} {damage}; take an older checkpoint of the run, or copy this one again (--no-verify "
            "reads it as it is; to train from it, export it so)"
        )


def _is_model(folder: Path, name: str) -> bool:
    path = PurePath(name)
    if path.parts[:-1] not in ((), (SHARDED,)):
        return False
    return path.suffix == ".safetensors" or name == INDEX or (name in _BESIDE_WEIGHTS and (folder / name).is_file())


def read_manifest(folder: Path) -> tuple[object, dict[str, tuple[int, int]]]:
    """Return a manifest's format, and (size, CRC-32) of each file by its path in the folder; raises what json does."""
    manifest = parse_json(read_bytes(folder / MANIFEST))
    return manifest.get("format"), {name: (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()}


def find_damage(folder: Path, files: Mapping[str, tuple[int, int]]) -> str | None:
    """Say what is wrong with the first file that is missing, of another size or changed; None when all are whole."""
    for name, (size, crc) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"is torn: {name} is missing"
            if path.stat().st_size != size:
                return f"is torn: {name} has {path.stat().st_size} bytes instead of {size}"
            if crc32(path) != crc:
                return f"is damaged: {name} does not match its checksum"
        except OSError as error:
            return f"is torn: {name[:60]} cannot be read ({error.strerror})"
    return None


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return value
