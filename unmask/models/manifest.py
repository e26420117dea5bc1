"""A checkpoint's manifest, the size and CRC-32 of each of its files, and the check of the files that are read."""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Event

from unmask.errors import ModelError
from unmask.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, SHARDED, WEIGHTS
from unmask.parsing import parse_json
from unmask.places import read_bytes

MANIFEST = "manifest.json"
STATE = "state.json"
_BESIDE_WEIGHTS = ("config.json", ADAPTER_CONFIG, "tokenizer.json")  # compared where they are there
_CHUNK = 2**22  # bytes
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Share:
    """What this process checks of a folder, every `of`-th file from `part` on, and how it hears of the others' parts.

    Attributes:
        tell: tells the others the damage that this process found and returns the first that anyone found, or None; an
            event that is set ends its waiting.
    """

    part: int = 0
    of: int = 1
    tell: Callable[[str | None, Event], str | None] = lambda damage, stopped: damage


@contextlib.contextmanager
def intact(folder: Path | None, check: bool = True, share: Share = Share()) -> Iterator[None]:  # noqa: B008 - frozen
    """Context that compares a model's or adapter's files with the manifest of the run that wrote them, if there is one.

    That is done beside what the context does, loading, and has an end when the context has: what was loaded is not used
    before. The optimizer's files, which only a resume reads, are left out, and so are settings that people edit: the
    chat template, generation_config.json, tokenizer_config.json.

    Raises:
        ModelError: a file is missing, too short, changed or not in the manifest, in place of what loading it may have
            raised.
    """
    if folder is None or not check or not _has_manifest(folder):
        yield
        return
    stopped = Event()
    with ThreadPoolExecutor(1, "manifest") as beside:
        checked = beside.submit(_check_model, folder, share, stopped)
        try:
            try:
                yield
            except Exception:
                checked.result()
                raise
            checked.result()
        finally:  # an interrupted loading does not wait for the rest
            stopped.set()


def _has_manifest(folder: Path) -> bool:
    """Say whether a run wrote a folder, with a manifest or one that was lost, or another tool left one of that name."""
    return any(os.path.lexists(folder / name) for name in (MANIFEST, STATE))


def _check_model(folder: Path, share: Share, stopped: Event) -> None:
    damage = None
    try:
        files = {name: entry for name, entry in read_manifest(folder)[1].items() if _is_model(folder, name)}
    except _UNREADABLE:
        if not (folder / STATE).is_file():
            return  # another tool's file of that name
        damage = f"is torn: its {MANIFEST} is missing or unreadable"
    else:
        own = dict(itertools.islice(sorted(files.items()), share.part, None, share.of))
        damage = _unlisted(folder, files) or find_damage(folder, own, stopped)
    damage = share.tell(damage, stopped)
    if damage is not None:
        raise ModelError(
            f"{folder.resolve()} {damage}; take an older checkpoint of the run, or copy this one again (--no-verify "
            "reads it as it is; to train from it, export it so)"
        )


def _unlisted(folder: Path, files: Mapping[str, object]) -> str | None:
    """Say which file that weights are read from lies in a folder and is not in its manifest."""
    parts = sorted(f"{SHARDED}/{path.name}" for path in (folder / SHARDED).glob("*.safetensors"))
    there = (name for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS, *parts) if (folder / name).exists())
    odd = next((name for name in there if name not in files), None)
    return None if odd is None else f"is damaged: {odd} is not in its {MANIFEST}"


def _is_model(folder: Path, name: str) -> bool:
    path = PurePath(name)
    if path.parts[:-1] not in ((), (SHARDED,)):
        return False
    return path.suffix == ".safetensors" or name == INDEX or (name in _BESIDE_WEIGHTS and (folder / name).is_file())


def read_manifest(folder: Path) -> tuple[object, dict[str, tuple[int, int]]]:
    """Return a manifest's format, and (size, CRC-32) of each file by its path in the folder; raises what json does."""
    manifest = parse_json(read_bytes(folder / MANIFEST))
    return manifest.get("format"), {name: (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()}


def find_damage(folder: Path, files: Mapping[str, tuple[int, int]], stopped: Event | None = None) -> str | None:
    """Say what is wrong with the first file that is missing, of another size or changed; None when all are whole.

    An event that is set, by another thread, ends it: then nothing is known.
    """
    for name, (size, crc) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"is torn: {name} is missing"
            if path.stat().st_size != size:
                return f"is torn: {name} has {path.stat().st_size} bytes instead of {size}"
            if crc32(path, stopped) != crc:
                if stopped is not None and stopped.is_set():
                    return None
                return f"is damaged: {name} does not match its checksum"
        except OSError as error:
            return f"is torn: {name[:60]} cannot be read ({error.strerror})"
    return None


def crc32(path: Path, stopped: Event | None = None) -> int:
    """Return the CRC-32 of a file's bytes; of some of them where an event is set meanwhile."""
    value = 0
    with path.open("rb") as file:
        while (chunk := file.read(_CHUNK)) and not (stopped is not None and stopped.is_set()):
            value = zlib.crc32(chunk, value)
    return value
