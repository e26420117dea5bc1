"""The file of an evaluation: a line that says what it is of, then one for each answer (`report/resumable.py`).

An evaluation of more rows goes on from one of the first of them. Its first line then says under GROWN_FROM how many it
had before, and which: those were divided into batches by themselves, and after an interruption they must be so again.
Until a row beyond them is answered, the evaluation of fewer rows can be had back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.report import resumable
from unmask.report.resumable import Record as Record
from unmask.report.resumable import append_records as append_records

HEAD = "evaluation"
GROWN_FROM = "grown_from"
# Fields of the first line that are of the rows, beside those of how each row is answered.
_OF_ROWS = ("rows", "questions", GROWN_FROM)
Size = list[Any]  # how many rows, and the fingerprint of their questions


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return what a file is of and its records; raises as `resumable.read_records`."""
    return resumable.read_records(path, HEAD)


def resume_records(path: Path, identity: Mapping[str, Any], units: Iterable[Collection[int]]) -> list[Record]:
    """Return the records that can be kept; arguments and errors as in `resumable.resume_records`."""
    return resumable.resume_records(path, HEAD, identity, units)


def resize_records(path: Path, identity_of: Callable[[int], Mapping[str, Any]], rows: int) -> list[Size]:
    """Make the file of an evaluation of the first rows one of more of them, or undo that; leave every other file alone.

    Args:
        path: the file; there may be none.
        identity_of: returns what an evaluation of the first N rows is, N at most `rows`.
        rows: number of rows that are wanted.

    Returns:
        what the evaluation had before it had this many rows, ascending; empty for one that never grew.

    Raises:
        ConfigError: the file is of another evaluation, or of more rows.
        CheckpointError: it cannot be written.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    found, records = read_records(path)
    if not records:
        return []
    sizes: list[Size] = [*found.get(GROWN_FROM, []), [found.get("rows", 0), found.get("questions")]]
    answered = 1 + max(record["row"] for record in records)
    while len(sizes) > 1 and sizes[-1][0] > rows and sizes[-2][0] >= answered:
        sizes.pop()
    had, questions = sizes[-1]
    wanted = identity_of(min(had, rows))
    asked = [rows, wanted.get("questions")]
    old = {**found, "rows": had, "questions": questions}
    different = resumable.first_difference(old, wanted, _OF_ROWS if had > rows else (GROWN_FROM,))
    if different is not None:
        raise ConfigError(f"{path}: holds another {HEAD} ({different}); choose another --output, or delete the file")
    if had > rows:
        raise ConfigError(f"{path}: {_too_many(had, rows, asked in sizes)}, or choose another --output")
    if had < rows:
        sizes.append([rows, identity_of(rows).get("questions")])
    if sizes[-1][0] != found.get("rows"):
        head = json.dumps({HEAD: grown_identity(identity_of(rows), sizes[:-1])}, ensure_ascii=False)
        resumable.write_lines(path, [head, *(resumable.as_line(record) for record in records)])
    return sizes[:-1]


def grown_identity(identity: Mapping[str, Any], grown: Sequence[Size]) -> dict[str, Any]:
    """Return what an evaluation is that had fewer rows before, as `resize_records` returns them."""
    return {**identity, **({GROWN_FROM: list(grown)} if grown else {})}


def _too_many(had: int, rows: int, known: bool) -> str:
    """Say that a file is of more rows, and what to do; `known` when those asked for are the first of them."""
    if known:
        return f"holds answers beyond the first {rows} of its {had} rows; give --limit {had} or more"
    return (
        f"is of {had} rows, and {rows} are asked for: fewer of the same, or other data; for the same --data give "
        f"--limit {had} or more"
    )


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
