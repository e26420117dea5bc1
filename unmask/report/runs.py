"""What a run directory holds, read back: configuration, events, sample answers and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unmask.errors import DataError
from unmask.report.metrics import read_metrics
from unmask.report.plots import find_log

SAMPLES = "samples.jsonl"
Event = Mapping[str, Any]
Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: what it is called in charts and tables; no two runs of a report have the same.
        folder: its directory.
        config: the resolved configuration, nested; empty when it was not kept.
        events: metrics.jsonl.
        samples: samples.jsonl, answers to the same rows at several steps.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    events: Sequence[Event]
    samples: Sequence[Event]

    def of(self, kind: str) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    def points(self, kind: str, field: str) -> Points:
        """Return steps and values of a numeric field, leaving out events that lack it."""
        found = [(e["step"], e[field]) for e in self.of(kind) if isinstance(e.get(field), (int, float))]
        return [float(step) for step, _ in found], [float(value) for _, value in found]

    def exact_match(self) -> Points:
        """Return steps and shares of right answers."""
        return self.points("exact_match", "exact_match")

    def terms(self) -> list[str]:
        """Return the names of the training loss's terms, as `<term>_loss`."""
        names = (name for event in self.of("train")[:1] for name in event)
        return [name for name in names if name.endswith("_loss")]

    def start(self) -> Event:
        """Return the last `run` event, which says what the run is made of; empty without one."""
        return next(iter(reversed(self.of("run"))), {})


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs; checkpoints in them stand for them.

    Raises:
        DataError: no run there, no finished step in it, or a file that is damaged.
    """
    logs = [find_log(folder) for folder in folders]
    names = distinct_names([log.parent.resolve() for log in logs])
    return [_read(log, name) for log, name in zip(logs, names, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, and as many before it as tell the paths apart; equal paths are numbered."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({number})" for number, folder in enumerate(folders, start=1)]


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{where}{key}."))
        else:
            found[f"{where}{key}"] = value
    return found


def differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted keys whose values differ between mappings, with the values; None where it is missing."""
    flattened = [flat(mapping) for mapping in mappings]
    keys = dict.fromkeys(key for mapping in flattened for key in mapping)
    rows = {key: [mapping.get(key) for mapping in flattened] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _read(log: Path, name: str) -> Run:
    folder = log.parent
    events = read_metrics(log)
    if not any(event["event"] == "train" for event in events):
        raise DataError(f"{folder}: the log has no finished step to report yet")
    samples = read_metrics(folder / SAMPLES) if (folder / SAMPLES).is_file() else []
    return Run(name, folder, _config(folder / "config.yaml"), events, samples)


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{path}: no readable configuration; copy the run again, or remove the file")
    return values
