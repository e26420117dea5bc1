"""The evaluations that `unmask eval --output DIR` left behind, for a report's table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.errors import DataError

RESULTS = "results.json"

# Field of a result → what it is called, and whether it is a share.
MEASURES: dict[str, tuple[str, bool]] = {
    "exact_match": ("exact match", True),
    "nats_per_token": ("bound, nats per token", False),
    "denoising_nats_per_token": ("denoising cross-entropy, nats per token", False),
    "ar_nats_per_token": ("autoregressive, nats per token", False),
}


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
    if not error or not math.isfinite(error):
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
        entries: Any = json.loads(path.read_text(encoding="utf-8"))["results"]
        return [result for entry in entries for result in _results(entry)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
