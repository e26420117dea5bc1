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
_BESIDE_WEIGHTS = ("config.json", ADAPTER_CONFIG, "tokenizer.json")  # compared too, but may be missing
_CHUNK = 2**22  # bytes
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what `read_manifest` may raise


@dataclass(frozen=True)
class Share:
    """The part of a folder's check that this process does: every `of`-th file, beginning with number `part`.

    Attributes:
        tell: gives the damage that this process found to the processes that check the other files, waits for theirs and
            returns the first that any of them found, or None. Setting the event ends the wait.
    """

    part: int = 0
    of: int = 1
    tell: Callable[[str | None, Event], str | None] = lambda damage, stopped: damage


@contextlib.contextmanager
def intact(folder: Path | None, check: bool = True, share: Share = Share()) -> Iterator[None]:  # noqa: B008 - frozen
    """Context that compares a model's or adapter's files with the manifest of the run that wrote them, if there is one.

    A thread compares while the body of the context loads the files. The context ends when both are done, so that no
    damaged weights are used. The optimizer's files, which only a resume reads, are left out, and so are settings that
    people edit: the chat template, generation_config.json, tokenizer_config.json.

    Raises:
        ModelError: a file is missing, too short, changed or not in the manifest; raised in place of an error that
            loading it led to.
    """
    if folder is None or not check or not _may_have_manifest(folder):
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


def _may_have_manifest(folder: Path) -> bool:
    """Say whether a folder may be a run's: by a file of the manifest's name, or a state whose manifest was lost."""
    return any(os.path.lexists(folder / name) for name in (MANIFEST, STATE))


def _check_model(folder: Path, share: Share, stopped: Event) -> None:
    """Compare this process's share of a folder with its manifest; ModelError for damage that any process found."""
    try:
        files = {name: entry for name, entry in read_manifest(folder)[1].items() if _is_model(folder, name)}
    except _UNREADABLE:
        if not (folder / STATE).is_file():
            return  # another tool's file of that name
        damage = f"is torn: its {MANIFEST} is missing or unreadable"
    else:
        part = dict(itertools.islice(sorted(files.items()), share.part, None, share.of))
        damage = unlisted(folder, files) or find_damage(folder, part, stopped)
    damage = share.tell(damage, stopped)
    if damage is not None:
        raise ModelError(
            f"{folder.resolve()} {damage}; take an older checkpoint of the run, or copy this one again (--no-verify "
            "reads it as it is; to train from it, export it so)"
        )


def unlisted(folder: Path, files: Mapping[str, object], place: str = "") -> str | None:
    """Say which tensors in a folder its manifest does not list, as loading would read them; None when it lists all.

    Args:
        files: the manifest's.
        place: of the folder among them, with a slash at its end.
    """
    inner = folder / place
    parts = sorted(f"{SHARDED}/{path.name}" for path in (inner / SHARDED).glob("*.safetensors"))
    # In the order of `stored_tensors`, which leaves those that come later alone.
    kinds = ([WEIGHTS], [INDEX], parts)
    read = next((names for names in kinds if any((inner / name).exists() for name in names)), [])
    present = (place + name for name in (*read, ADAPTER_WEIGHTS) if (inner / name).exists())
    name = next((name for name in present if name not in files), None)
    return None if name is None else f"is damaged: {name} is not in its {MANIFEST}"


def _is_model(folder: Path, name: str) -> bool:
    """Say whether a file of a manifest is one that loading a model or adapter reads and `intact` compares."""
    path = PurePath(name)
    if path.parts[:-1] not in ((), (SHARDED,)):
        return False
    return path.suffix == ".safetensors" or name == INDEX or (name in _BESIDE_WEIGHTS and (folder / name).is_file())


def read_manifest(folder: Path) -> tuple[object, dict[str, tuple[int, int]]]:
    """Return a manifest's format, and (size, CRC-32) of each file by its path in the folder.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, TypeError, AttributeError: it is no JSON, or of another shape.
    """
    manifest = parse_json(read_bytes(folder / MANIFEST))
    return manifest.get("format"), {name: (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()}


def find_damage(folder: Path, files: Mapping[str, tuple[int, int]], stopped: Event | None = None) -> str | None:
    """Say what is wrong with the first file that is missing, of another size or changed; None when all are whole.

    Once another thread has set `stopped` it soon returns None, which then says nothing.
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
    """Return the CRC-32 of a file's bytes; only of those read so far once another thread has set `stopped`."""
    value = 0
    with path.open("rb") as file:
        while (chunk := file.read(_CHUNK)) and not (stopped is not None and stopped.is_set()):
            value = zlib.crc32(chunk, value)
    return value
