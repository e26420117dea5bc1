"""The run's log: one JSON object a line in `metrics.jsonl`, the single source for plots, trackers and reports."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError

FILE = "metrics.jsonl"


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
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run directory with a {FILE}") from None
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        elif number < len(lines):
            raise DataError(f"{path}:{number}: not an event of a run; the log is damaged there")
    return events


def cut_after(path: Path, step: int) -> None:
    """Drop the events of later steps, which a resumed run will write again; atomic."""
    if not path.exists():
        return
    kept = [event for event in read_metrics(path) if event.get("step", 0) <= step]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
    os.replace(temporary, path)
