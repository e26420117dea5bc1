"""A JSONL file of records that are written as they come, so that an interrupted job goes on where it stopped.

The first line says what the file is of: everything that decides the records. A file whose first line is another one
belongs to another job and is never touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import CheckpointError, ConfigError
from unmask.parsing import parse_json
from unmask.places import part_of, read_bytes

Record = dict[str, Any]
_ESCAPED = "backslashreplace"  # as JSON writes half a surrogate pair, which names of files may hold


@dataclass(frozen=True)
class Kind:
    """What a file is of: `name`, what its first line is called, as `evaluation`, and what is a record in it."""

    name: str
    is_record: Callable[[Record], bool]


def read_records(path: Path, kind: Kind) -> tuple[dict[str, Any], list[Record]]:
    """Return what a file is of and its records; a last line that was cut short is left out.

    Raises:
        ConfigError: no such file, or one of another kind; names the first line that is no record.
    """
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file of this kind: {kind.name}") from None
    head: dict[str, Any] | None = None
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is empty or torn
        if not line:
            continue
        try:
            value = parse_json(line, strict=False)
            # Names of files may hold bytes that are no UTF-8; any other half of a surrogate pair is damage.
            as_line(value).encode(errors="surrogateescape")
            if head is None:
                head = dict(value[kind.name])
            elif type(value["row"]) is int and kind.is_record(value):
                records.append(value)
            else:
                raise ValueError(value)
        except (ValueError, KeyError, TypeError):
            if head is None:
                break
            raise ConfigError(
                f"{path}:{number}: no record of this kind: {kind.name}; remove the line, and it is made anew, or "
                "choose another --output"
            ) from None
    if head is None:
        raise ConfigError(f"{path}: is no file of this kind: {kind.name}; delete it or choose another --output")
    return head, records


def resume_records(
    path: Path, kind: Kind, identity: Mapping[str, Any], units: Iterable[Collection[int]], more: Sequence[Path] = ()
) -> list[Record]:
    """Return the records that can be kept, and leave the file with those alone; make it if there is none.

    Args:
        path: the file.
        kind: what it is of.
        identity: what this job is, as plain JSON values.
        units: rows, by their numbers in the records' `row`, that belong together. The records of a unit that is not
            complete are dropped: computed again together, they come out as they would have without an interruption.
        more: files of the same job that other processes wrote; they are taken in and removed.

    Raises:
        ConfigError: a file has records of another job; the message names the first difference.
        CheckpointError: it cannot be written.
    """
    have: dict[int, Record] = {}
    for file in (path, *more):
        if file.exists() and file.stat().st_size:
            found, records = read_records(file, kind)
            # A job that was refused before its first record must not be in the way of the next one.
            different = first_difference(found, identity) if records else None
            if different is not None:
                raise ConfigError(
                    f"{file}: holds another {kind.name} ({different}); choose another --output, or delete the file"
                )
            have.update({record["row"]: record for record in records})
    kept = [have[row] for unit in units if all(row in have for row in unit) for row in unit]
    write_lines(
        path, [json.dumps({kind.name: dict(identity)}, ensure_ascii=False), *(as_line(record) for record in kept)]
    )
    for file in more:
        file.unlink(missing_ok=True)
    return kept


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add records at the end of a file, on the disk before this returns; raises CheckpointError."""
    try:
        with path.open("a", encoding="utf-8", errors=_ESCAPED) as file:
            file.write("".join(as_line(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); make room, and the same command goes on"
        ) from None


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file beside its place and rename it; raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part_of(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors=_ESCAPED)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None


def as_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False)


def first_difference(
    found: Mapping[str, Any], wanted: Mapping[str, Any], apart_from: Collection[str] = ()
) -> str | None:
    """Return the first field in which two jobs differ as `NAME OLD, not NEW`; None where they are the same.

    Args:
        found: what there is.
        wanted: what it should be.
        apart_from: fields that may differ.
    """
    for name in (*wanted, *found):
        old, new = found.get(name), wanted.get(name)
        if old == new or name in apart_from:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = next((key for key in (*new, *old) if old.get(key) != new.get(key)), None)
            if inner is None:  # a null that the other has not
                continue
            name, old, new = f"{name}.{inner}", old.get(inner), new.get(inner)
        return f"{name} {_shown(old)}, not {_shown(new)}"
    return None


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
