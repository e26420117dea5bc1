"""What a run directory holds, read back: configuration, events, sample answers and evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.parsing import parse_json, parse_yaml
from unmask.places import read_bytes
from unmask.report.metrics import read_metrics
from unmask.report.plots import find_log

SAMPLES = "samples.jsonl"
RESULTS = "results.json"

# Field of a result → what it is called, and whether it is a share.
MEASURES: dict[str, tuple[str, bool]] = {
    "exact_match": ("exact match", True),
    "nats_per_token": ("bound, nats per token", False),
    "denoising_nats_per_token": ("denoising cross-entropy, nats per token", False),
    "ar_nats_per_token": ("autoregressive, nats per token", False),
}
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
        """Return steps and finite values of a numeric field, leaving out events that lack it."""
        found = [(e["step"], e[field]) for e in self.of(kind) if math.isfinite(e.get(field, math.nan))]
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
        values = parse_yaml(read_bytes(path).decode())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{path}: no readable configuration; copy the run again, or remove the file")
    return values


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        task: name of the task.
        of: the model's short name in that evaluation.
        measure: what the number is called.
        value: it.
        share: whether it is a share, shown as per cent.
        interval: its 95 % interval; None where there is none.
        rows: how many rows it is over.
        compared: how the answers differ from others.
        settings: what it depends on.
    """

    task: str
    of: str
    measure: str
    value: float
    share: bool
    interval: tuple[float, float] | None
    rows: int | None
    compared: str = ""
    settings: str = ""

    def cells(self) -> list[str]:
        """Return a row of the table."""
        between = "" if self.interval is None else " to ".join(self._shown(end) for end in self.interval)
        rows = "" if self.rows is None else f"{self.rows:,}"
        return [self.task, self.of, self.measure, self._shown(self.value), between, rows, self.compared, self.settings]

    def _shown(self, value: float) -> str:
        if self.share:
            return f"{100 * value:.1f} %"
        return shown(value, None if self.interval is None else (self.interval[1] - self.interval[0]) / 3.92)


def shown(value: float, error: float | None = None) -> str:
    """Return a number with two digits of its error, or four digits where there is none; 1e-05 for what is tiny."""
    if not error or not 0 < error < math.inf:
        return f"{value:.4g}"
    places = max(0, 1 - math.floor(math.log10(error) + 1e-9))
    return f"{value:.{places}f}" if places <= 8 and abs(value) < 1e8 else f"{value:.4g}"


def find_results(runs: Sequence[Path], named: Sequence[Path]) -> list[Result]:
    """Return the results inside run directories (or one folder down) and in folders named.

    Raises:
        DataError: a named folder without results, or a file that is damaged.
    """
    files = []
    for folder in named:
        if not (folder / RESULTS).is_file():
            raise DataError(f"--evaluation: {folder} has no {RESULTS}; give a folder that `unmask eval --output` wrote")
        files.append(folder / RESULTS)
    for run in runs:
        files += [path for path in (run / RESULTS, *sorted(run.glob(f"*/{RESULTS}"))) if path.is_file()]
    unique = {path.resolve(): path for path in files}
    found = [(path, result) for path in unique.values() for result in read_results(path)]
    where: dict[str, set[Path]] = {}
    for path, result in found:
        where.setdefault(result.of, set()).add(path)
    # Every run is called `run` by its own evaluation, if that is its folder's name.
    return [
        result if len(where[result.of]) == 1 else replace(result, of=f"{result.of} ({path.parent})")
        for path, result in found
    ]


def read_results(path: Path) -> list[Result]:
    """Return the results of a file; DataError names one that is damaged."""
    try:
        entries: Any = parse_json(read_bytes(path), strict=False)["results"]
        return [result for entry in entries for result in _results(entry)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise DataError(f"{path}: not a file of `unmask eval`; evaluate again, or take the file away") from None


def _results(entry: Mapping[str, Any]) -> list[Result]:
    """Return one line for each number of an entry: those that have a name here, and all of the harness's."""
    task, of = str(entry["task"]), str(entry["model"])
    found = []
    for measure, number in entry.get("metrics", {}).items():
        error = number["standard_error"]
        found.append(Result(task, of, measure, float(number["value"]), False, _around(number["value"], error), None))
    for field, (measure, share) in MEASURES.items():
        value = entry.get(field)
        if value is None:
            continue
        interval = None
        if share and entry.get("low") is not None:
            interval = float(entry["low"]), float(entry["high"])
        elif entry.get("standard_error") is not None and field != "ar_nats_per_token":
            interval = _around(value, entry["standard_error"])
        rows = entry.get("total", entry.get("rows"))
        rows = None if rows is None else int(rows)
        found.append(Result(task, of, measure, float(value), share, interval, rows))
    return [replace(result, compared=_compared(entry), settings=_settings(entry)) for result in found]


def _compared(entry: Mapping[str, Any]) -> str:
    names = {"first": "the first model", "against": "an earlier evaluation"}
    return "; ".join(
        f"+{counts['gained']} −{counts['lost']}, {counts['differing']} of {counts['rows']} differ from {names[name]}"
        for name, counts in entry.get("compared", {}).items()
        if name in names
    )


def _settings(entry: Mapping[str, Any]) -> str:
    """Return the settings that were set, without fingerprints."""
    settings = dict(entry.get("settings", {}))
    plain = {name: value for name, value in settings.items() if name not in ("sampler", "questions", "rows")}
    plain |= settings.get("sampler") or {}
    if "batch_size" in entry:
        plain["batch_size"] = entry["batch_size"]
    return ", ".join(f"{name} {value}" for name, value in plain.items() if value not in (None, False, [], {}, ""))


def _around(value: float, error: float | None) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean with a standard error, None where that is not known or nothing varies."""
    return None if not error else (float(value) - 1.96 * float(error), float(value) + 1.96 * float(error))
