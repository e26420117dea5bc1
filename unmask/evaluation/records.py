"""The file of an evaluation: a line that says what it is of, then one for each answer, written as they come.

The first line holds everything that decides the answers in exact arithmetic. A file whose first line is another one is
of another evaluation and is never touched. What is missing at the end of a file is taken up again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import CheckpointError, ConfigError

HEAD = "evaluation"
Record = dict[str, Any]


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return what a file is of and its records; a last line that was cut short is left out.

    Raises:
        ConfigError: no such file, or one that is no evaluation's.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file of `unmask eval`") from None
    whole = [line for line in lines[:-1] if line]  # what follows the last line break is empty or torn
    try:
        head, *records = (json.loads(line) for line in whole)
        return dict(head[HEAD]), records
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: is no file of answers of `unmask eval`; delete it or choose another --output"
        ) from None


def resume_records(path: Path, identity: Mapping[str, Any], units: Iterable[Collection[int]]) -> list[Record]:
    """Return the records of a file that can be kept, and leave the file with those alone; make it if there is none.

    Args:
        path: the file.
        identity: what this evaluation is of, as plain JSON values.
        units: rows that are computed together. The records of a unit that is not complete are dropped: computed again
            together, they come out as they would have without an interruption.

    Raises:
        ConfigError: the file is of another evaluation; the message names the first difference.
        CheckpointError: it cannot be written.
    """
    kept: list[Record] = []
    if path.exists() and path.stat().st_size:
        found, records = read_records(path)
        _check_same(path, found, identity)
        have = {record["row"]: record for record in records}
        kept = [have[row] for unit in units if all(row in have for row in unit) for row in unit]
    lines = [json.dumps({HEAD: dict(identity)}, ensure_ascii=False), *(_line(record) for record in kept)]
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None
    return kept


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add records at the end of a file, on the disk before this returns; raises CheckpointError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); make room, and the same command goes on"
        ) from None


@dataclass(frozen=True)
class Comparison:
    """How two evaluations of the same questions differ, row by row.

    Attributes:
        rows: questions that both answered.
        differing: those whose answers are not the same tokens.
        gained: those that only the second answered correctly.
        lost: those that only the first answered correctly.
    """

    rows: int
    differing: int
    gained: int
    lost: int


def compare(first: Iterable[Record], second: Iterable[Record]) -> Comparison:
    """Compare the answers of two evaluations of the same questions, such as one with another batch size.

    With equal weights, sampler and seed the draws are the same whatever the batch, so what differs are choices between
    two that tie in the model's precision: `differing` counts the answers that such ties reached, `gained` + `lost` the
    judgements.
    """
    before = {record["row"]: record for record in first}
    pairs = [(before[record["row"]], record) for record in second if record["row"] in before]
    return Comparison(
        rows=len(pairs),
        differing=sum(old["token_ids"] != new["token_ids"] for old, new in pairs),
        gained=sum(new["correct"] and not old["correct"] for old, new in pairs),
        lost=sum(old["correct"] and not new["correct"] for old, new in pairs),
    )


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False)


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in (*wanted, *found):
        old, new = found.get(name), wanted.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = next(key for key in (*new, *old) if old.get(key) != new.get(key))
            name, old, new = f"{name}.{inner}", old.get(inner), new.get(inner)
        raise ConfigError(
            f"{path}: holds another evaluation ({name} {_shown(old)}, not {_shown(new)}); choose another --output, or "
            "delete the file"
        )


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
