"""The run's log: one JSON object a line in `metrics.jsonl`, the single source for plots, trackers and reports."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.parsing import ParseProblem, parse_json
from unmask.places import part_of, read_bytes

FILE = "metrics.jsonl"

# What plots and reports take from events, by what it must be where it is there.
_NUMBERS = {
    "step", "time", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "tokens_per_second_per_device", "mfu",
    "data_seconds", "exchange_seconds", "memory_gib", "exact_match", "value", "total_steps", "parameters",
    "trainable_parameters", "rows",
}  # fmt: skip
_TEXTS = {"event", "reason", "metric", "row", "prompt", "text", "reference"}
_OBJECTS = {"environment", "versions"}
_LEVELS = 5  # parts of the noise levels in loss_by_noise_level
# Event → what it cannot be without.
_NEEDED = {
    "train": {"step"},
    "validation": {"step"},
    "exact_match": {"step"},
    "best": {"step", "metric", "value"},
    "end": {"reason"},
    "sample": {"step", "prompt", "text", "reference"},
}
_LARGEST = 1e100  # no number of a run is larger


class MetricsLog:
    """Appends events to a file and passes each on to listeners (trackers).

    Args:
        path: the file; its folder must exist.
        listeners: called with every event as written.
        closers: called by `close`.
    """

    def __init__(
        self,
        path: Path,
        listeners: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        closers: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._listeners = tuple(listeners)
        self._closers = tuple(closers)
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, **values: Any) -> None:
        """Append one event; `time` (seconds since the epoch) is added.

        Raises:
            DataError: the disk is full or read-only.
        """
        record = {"event": event, **values, "time": round(time.time(), 3)}
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise DataError(
                f"{self._path}: cannot be written ({error.strerror}); free some space, then run again to resume from "
                "the last checkpoint"
            ) from None
        for listener in self._listeners:
            listener(record)

    def close(self) -> None:
        """Close the file and end the listeners' runs. A full disk is not reported again: `write` has done so."""
        with contextlib.suppress(OSError):
            self._file.close()
        for close in self._closers:
            close()


class SilentLog:
    """The log of every rank but the first: takes events and keeps none."""

    def write(self, event: str, **values: Any) -> None:
        """Drop an event."""

    def close(self) -> None:
        """Return: there is nothing to close."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log; a last line that a killed process left unfinished is left out.

    Raises:
        DataError: no such file, or a damaged line before the last.
    """
    events, damaged = _read(path)
    if damaged:
        raise DataError(
            f"{path}:{damaged[0]}: not an event of a run; the log is damaged there: remove that line, or resume the "
            "run, which does so"
        )
    return events


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the events of a log, and the numbers of damaged lines before the last."""
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run directory with a {FILE}") from None
    events, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = parse_json(line, strict=False)
        except ParseProblem:
            event = None
        if _is_event(event):
            events.append(event)
        elif number < len(lines):
            damaged.append(number)
    return events, damaged


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and event.keys() >= _NEEDED.get(str(event.get("event")), {"event"})
        and all(_fits(name, value) for name, value in event.items())
    )


def _fits(name: str, value: Any) -> bool:
    if name in ("step", "time"):
        return is_number(value) and math.isfinite(value)
    if name in _NUMBERS or name.endswith("_loss"):
        return is_number(value)
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _OBJECTS:
        return isinstance(value, dict)
    if name == "loss_by_noise_level":
        return isinstance(value, list) and len(value) == _LEVELS and all(v is None or is_number(v) for v in value)
    if name == "frames":
        return isinstance(value, list) and all(
            isinstance(frame, dict) and is_number(frame.get("nfe")) and isinstance(frame.get("text"), str)
            for frame in value
        )
    return True


def is_number(value: Any) -> bool:
    """Say whether a JSON value is a number that can be drawn, or one that is not finite, which is left out."""
    return type(value) in (int, float) and not (abs(value) > _LARGEST and abs(value) != math.inf)


def cut_after(path: Path, step: int) -> str | None:
    """Drop the events of later steps, which a resumed run will write again, and damaged lines; atomic.

    Returns:
        A note about the damaged lines; None where there were none.
    """
    if not path.exists():
        return None
    events, damaged = _read(path)
    kept = [event for event in events if event.get("step", 0) <= step]
    with part_of(path) as part:
        part.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
    if not damaged:
        return None
    return f"{path}: {len(damaged)} damaged lines were removed, the first of them line {damaged[0]}"
