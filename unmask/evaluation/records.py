"""The file of an evaluation: a line that says what it is of, then one for each answer (`report/resumable.py`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.report import resumable
from unmask.report.resumable import Record as Record
from unmask.report.resumable import append_records as append_records

HEAD = "evaluation"


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return what a file is of and its records; raises as `resumable.read_records`."""
    return resumable.read_records(path, HEAD)


def resume_records(path: Path, identity: Mapping[str, Any], units: Iterable[Collection[int]]) -> list[Record]:
    """Return the records that can be kept; arguments and errors as in `resumable.resume_records`."""
    return resumable.resume_records(path, HEAD, identity, units)


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
