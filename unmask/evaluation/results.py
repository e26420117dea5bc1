"""`results.json` of an evaluation folder, and the table printed from it: an entry for each task and model.

Every command with the same `--output` adds to the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from unmask.errors import ConfigError
from unmask.evaluation.job import Checkpoint, EvalPlan
from unmask.evaluation.tasks import HARNESS
from unmask.parsing import parse_json
from unmask.places import read_bytes
from unmask.report.metrics import is_number
from unmask.report.resumable import Record, first_difference, write_lines
from unmask.report.runs import RESULTS as RESULTS
from unmask.report.runs import shown

_PIPE_WIDTH = 10_000  # columns of a file or a pipe


@dataclass
class Outcome:
    """The result of one task for one checkpoint."""

    task: str  # the harness's with the prefix
    label: str  # of the checkpoint
    kind: Literal["answers", "likelihood", "harness"]
    result: dict[str, Any]  # numbers by name; of the harness, metric → value and standard error
    settings: dict[str, Any]  # what it depends on beside the weights, as plain JSON values
    file: str | None  # of its answers; None where there is none, as for a group of tasks
    batch_size: int | list[int]  # several where the answers came from several runs
    records: list[Record] = field(default_factory=list)  # none of the harness's
    seconds: float | None = None  # that computing `timed_rows` of the answers took; None = unknown
    timed_rows: int = 0
    # How the answers differ from the `first` checkpoint's, and from an earlier evaluation's (`against`).
    compared: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """Return its entry in `results.json`."""
        timed = {} if self.seconds is None else {"seconds": round(self.seconds, 3)}
        if self.records and timed:
            timed["timed_rows"] = self.timed_rows
        return {
            "task": self.task,
            "model": self.label,
            **({"metrics": self.result} if self.kind == "harness" else self.result),
            "compared": self.compared,
            "file": self.file,
            "batch_size": self.batch_size,
            **timed,
            "settings": self.settings,
        }

    def add_earlier(self, entry: Mapping[str, Any]) -> None:
        """Add the time that an earlier command spent on answers which this one found in the file."""
        if self.kind == "harness" or self.timed_rows == len(self.records) or entry.get("seconds") is None:
            return
        if self.kind == "likelihood" and not self.timed_rows:
            self.batch_size = entry.get("batch_size", self.batch_size)
        self.seconds = entry["seconds"] + (self.seconds or 0.0)
        self.timed_rows += entry.get("timed_rows", len(self.records))


@dataclass(frozen=True)
class Results:
    """The contents of a `results.json`: checkpoints by label, and entries by (task, label)."""

    checkpoints: dict[str, dict[str, Any]]
    entries: dict[tuple[str, str], dict[str, Any]]


def read_results(plan: EvalPlan) -> Results:
    """Return the earlier results in a job's output folder, possibly none.

    Raises:
        ConfigError: a file of something else, a label that stands for other weights there, or a task of the harness of
            another number of documents.
    """
    path = plan.output / RESULTS
    try:
        values = parse_json(read_bytes(path), strict=False) if path.exists() else {"models": [], "results": []}
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
        earlier = Results(
            {model["label"]: {**model, "fingerprint": dict(model["fingerprint"])} for model in values["models"]},
            {(entry["task"], entry["model"]): _checked(entry) for entry in values["results"]},
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not a file of `unmask eval`; choose another --output or delete it") from None
    remedy = "choose another --output, or delete the folder"
    for checkpoint in plan.checkpoints:
        old = earlier.checkpoints.get(checkpoint.label, {}).get("fingerprint")
        # A folder that was moved holds the same model.
        different = None if old is None else first_difference(old, checkpoint.plan.fingerprint())
        if different is not None:
            raise ConfigError(f"{path}: {checkpoint.label} is another model there ({different}); {remedy}")
        for name in plan.job.harness_tasks:
            entry = earlier.entries.get((HARNESS + name.removeprefix(HARNESS), checkpoint.label))
            if entry is not None and entry["settings"].get("limit") != plan.job.limit:
                had, wanted = (number or "all" for number in (entry["settings"].get("limit"), plan.job.limit))
                raise ConfigError(
                    f"{path}: holds {entry['task']}, {entry['model']}, of {had} documents, not {wanted}; {remedy}"
                )
    return earlier


def _checked(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry, of which this module reads the settings and the time; ValueError or TypeError if malformed."""
    if not is_number(entry.get("seconds", 0)) or type(entry.get("timed_rows", 0)) is not int:
        raise ValueError(entry)
    return {**entry, "settings": dict(entry["settings"])}


def write_results(plan: EvalPlan, outcomes: Sequence[Outcome], earlier: Results) -> None:
    """Write a job's results file: earlier entries, with the outcomes in their places or behind; CheckpointError."""
    models = earlier.checkpoints | {checkpoint.label: _described(checkpoint) for checkpoint in plan.checkpoints}
    entries = earlier.entries | {(outcome.task, outcome.label): outcome.entry() for outcome in outcomes}
    values = {"models": list(models.values()), "results": list(entries.values())}
    write_lines(plan.output / RESULTS, [json.dumps(values, indent=2, ensure_ascii=False)])


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "label": checkpoint.label,
        "checkpoint": str(checkpoint.plan.folder),
        "adapter": None if checkpoint.plan.adapter is None else str(checkpoint.plan.adapter),
        "fingerprint": checkpoint.plan.fingerprint(),
    }


@dataclass(frozen=True)
class Comparison:
    """How two evaluations of the same questions differ, in rows that both answered.

    `differing` answers are not the same tokens; only the second is right in `gained` ones, only the first in `lost`.
    """

    rows: int
    differing: int
    gained: int
    lost: int


def compare(first: Iterable[Record], second: Iterable[Record]) -> Comparison:
    """Compare the answers of two evaluations of the same questions, such as one with another batch size.

    With equal weights, sampler and seed the draws are the same whatever the batch, so the answers differ only where
    choices tie in the model's precision.
    """
    before = {record["row"]: record for record in first}
    pairs = [(before[record["row"]], record) for record in second if record["row"] in before]
    return Comparison(
        rows=len(pairs),
        differing=sum(old["token_ids"] != new["token_ids"] for old, new in pairs),
        gained=sum(new["correct"] and not old["correct"] for old, new in pairs),
        lost=sum(old["correct"] and not new["correct"] for old, new in pairs),
    )


def output_console(quiet: bool = False) -> Console:
    """Return a console on standard output; in a file or a pipe as wide as its lines, or as COLUMNS says."""
    console = Console(quiet=quiet)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _PIPE_WIDTH
    return console


def outcome_table(labels: Sequence[str], outcomes: Sequence[Outcome]) -> Table:
    """Return the table of all outcomes: a row for each task and number, a column for each checkpoint."""
    table = Table(title=None, header_style="bold")
    table.add_column("task")
    table.add_column("measure")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        found = {outcome.label: _rows(outcome) for outcome in outcomes if outcome.task == task}
        measures = list(dict.fromkeys(measure for rows in found.values() for measure in rows))
        for number, measure in enumerate(measures):
            cells = [found.get(label, {}).get(measure, "") for label in labels]
            table.add_row(task if number == 0 else "", measure, *cells, end_section=number == len(measures) - 1)
    return table


def _rows(outcome: Outcome) -> dict[str, str]:
    """Return the rows of one outcome: number → its value as text."""
    result = outcome.result
    timed = _seconds(outcome)
    if outcome.kind == "harness":
        return timed | {name: _with_error(value["value"], value["standard_error"]) for name, value in result.items()}
    if outcome.kind == "answers":
        return _answer_rows(result, outcome) | timed
    if "nats_per_token" in result:
        rows = {
            "bound, nats a token": _with_error(result["nats_per_token"], result["standard_error"]),
            "perplexity, bound's": _perplexity(result["perplexity_bound"], result["standard_error"]),
        }
    else:
        rows = {
            "denoising cross-entropy": _with_error(result["denoising_nats_per_token"], result["standard_error"]),
            "encoder, nats a token": shown(result["ar_nats_per_token"]),
            "encoder's perplexity": _perplexity(result["ar_perplexity"]),
        }
    return {**rows, "answers, tokens": f"{result['rows']}, {result['tokens']}", **timed}


def _seconds(outcome: Outcome) -> dict[str, str]:
    """Return the row of the time, or none; it says of how many answers where it is not of all."""
    if outcome.seconds is None:
        return {}
    part = "" if outcome.timed_rows == len(outcome.records) else f" ({outcome.timed_rows} answers)"
    return {"seconds": f"{outcome.seconds:.1f}{part}"}


def _answer_rows(result: dict[str, Any], outcome: Outcome) -> dict[str, str]:
    rows = {
        "exact match": f"{100 * result['exact_match']:.1f} %",
        "95 % interval": f"{100 * result['low']:.1f} to {100 * result['high']:.1f}",
        "right": f"{result['right']} of {result['total']}",
        "ended by themselves": f"{100 * result['ended']:.0f} %",
        "network calls an answer": f"{result['network_calls']:.1f}",
    }
    for name, said in (("first", "against the first model"), ("against", "against --against")):
        if name in outcome.compared:
            found = outcome.compared[name]
            rows[said] = f"+{found['gained']} −{found['lost']}, {found['differing']} answers differ"
    return rows


def _with_error(value: float, error: float | None) -> str:
    return f"{shown(value, error)} ± {shown(error, error)}" if error else shown(value)


def _perplexity(value: float | None, error: float | None = None) -> str:
    """Return a perplexity, exp of nats a token, with its error, from that of the nats."""
    return "over 1e304" if value is None else _with_error(value, error and error * value)
