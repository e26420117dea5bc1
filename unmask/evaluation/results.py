"""`results.json`: one entry for each task and model, kept and added to by every command with the same `--output`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unmask.errors import CheckpointError, ConfigError
from unmask.evaluation.contestant import Contestant
from unmask.evaluation.records import Record
from unmask.report.evaluations import RESULTS as RESULTS
from unmask.report.resumable import first_difference


@dataclass
class Outcome:
    """One task of one model.

    Attributes:
        task: its name; of the harness's tasks with our prefix, since both may have one of that name.
        label: the model's.
        kind: whose task it is and what it measures.
        result: its numbers by name; of the harness, metric → value and standard error.
        settings: what the result depends on beside the weights, as plain JSON values.
        file: name of the file of its answers; None where there is none, as for a group of tasks.
        batch_size: rows at once; several where the answers came from several runs.
        records: its records; empty for the harness's tasks.
        seconds: that its answers took; None where that is not known.
        timed_rows: the answers that those seconds are of.
        compared: how the answers differ from others: `first` model's, and those of an earlier evaluation (`against`).
    """

    task: str
    label: str
    kind: Literal["answers", "likelihood", "harness"]
    result: dict[str, Any]
    settings: dict[str, Any]
    file: str | None
    batch_size: int | list[int]
    records: list[Record] = field(default_factory=list)
    seconds: float | None = None
    timed_rows: int = 0
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
        """Take over what an earlier command spent on answers that this one found done."""
        if self.kind == "harness" or self.timed_rows == len(self.records) or entry.get("seconds") is None:
            return
        if self.kind == "likelihood" and not self.timed_rows:
            self.batch_size = entry.get("batch_size", self.batch_size)
        self.seconds = entry["seconds"] + (self.seconds or 0.0)
        self.timed_rows += entry.get("timed_rows", len(self.records))


@dataclass(frozen=True)
class Results:
    """What a `results.json` holds: models by label, and entries by (task, label)."""

    models: dict[str, dict[str, Any]]
    entries: dict[tuple[str, str], dict[str, Any]]


def read_results(output: Path) -> Results:
    """Return what is there already, possibly nothing; ConfigError for a file of something else."""
    path = output / RESULTS
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": [], "results": []}
        return Results(
            {model["label"]: dict(model) for model in values["models"]},
            {(entry["task"], entry["model"]): dict(entry) for entry in values["results"]},
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not a file of `unmask eval`; choose another --output or delete it") from None


def check_models(contestants: Sequence[Contestant], earlier: Results, output: Path) -> None:
    """Refuse a model whose label is another model's in the results that are there; raises ConfigError."""
    for contestant in contestants:
        old, new = earlier.models.get(contestant.label), _model(contestant)
        if old is None:
            continue
        # A folder that was moved holds the same model.
        names = ("fingerprint",) if "fingerprint" in old else ("checkpoint", "adapter")
        different = first_difference({name: old.get(name) for name in names}, {name: new[name] for name in names})
        if different is not None:
            raise ConfigError(
                f"{output / RESULTS}: {contestant.label} is another model there ({different}); choose another "
                "--output, or delete the folder"
            )


def check_limits(
    names: Sequence[str], labels: Sequence[str], limit: int | None, earlier: Results, output: Path
) -> None:
    """Refuse a task of the harness whose result is there for more documents, and would be replaced; raises ConfigError.

    Args:
        names: the harness's tasks as results have them, with our prefix.
        labels: the models'.
        limit: documents of each task that are asked for; None = all.
        earlier: the results that are there.
        output: their folder.
    """
    for name in names:
        for label in labels:
            entry = earlier.entries.get((name, label))
            had = None if entry is None else entry["settings"]["limit"]
            if entry is None or limit is None or (had is not None and had <= limit):
                continue
            held, remedy = ("all", "leave --limit out") if had is None else (had, f"give --limit {had} or more")
            raise ConfigError(
                f"{output / RESULTS}: holds {name}, {label}, of {held} documents, more than the {limit} asked for; "
                f"{remedy}, or choose another --output"
            )


def write_results(contestants: Sequence[Contestant], outcomes: Sequence[Outcome], earlier: Results, path: Path) -> None:
    """Write a results file: what was there, and in their places or after it the outcomes; raises CheckpointError."""
    models = earlier.models | {contestant.label: _model(contestant) for contestant in contestants}
    entries = earlier.entries | {(outcome.task, outcome.label): outcome.entry() for outcome in outcomes}
    values = {"models": list(models.values()), "results": list(entries.values())}
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None


def _model(contestant: Contestant) -> dict[str, Any]:
    return {
        "label": contestant.label,
        "checkpoint": contestant.checkpoint,
        "adapter": contestant.adapter,
        "fingerprint": contestant.fingerprint(),
    }
