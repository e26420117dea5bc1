"""`unmask train --profile N`: a torch profiler trace of N steps, and a summary of where their time went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from unmask.training.step import BACKWARD, CORRUPT, DATA, EXCHANGE, FORWARD, UPDATE

_LEFT_OUT = 2  # first steps of a start, in which kernels are chosen and caches filled
_LINES = 12  # operations in the summary
_PARTS = (DATA, CORRUPT, EXCHANGE, FORWARD, BACKWARD, UPDATE)


class StepProfiler:
    """Context of a training loop that profiles some of its steps.

    Args:
        steps: how many, from the third step of this start on; 0 = none.
        folder: gets the trace, `step_A-B.json.gz`, for https://ui.perfetto.dev or chrome://tracing.
        say: called with each line of the summary.
    """

    def __init__(self, steps: int, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._made: list[int] = []
        self._written = False
        self._profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            plan = schedule(wait=_LEFT_OUT - 1, warmup=1, active=steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(kind, error, trace)
        if not self._written and kind is None:
            self._say(f"profile: nothing was profiled, since only {len(self._made)} steps were made; it starts with "
                      f"the {_LEFT_OUT + 1}rd")  # fmt: skip

    def made(self, step: int) -> None:
        """Record that a training step has ended; after the last one that is profiled, trace and summary are written."""
        if self._profile is not None:
            self._made.append(step)
            self._profile.step()

    def _write(self, done: profile) -> None:
        """Write the trace and print the summary; torch's profiler calls it, also where training ends early."""
        steps = self._made[_LEFT_OUT:]
        if not steps:
            return
        self._written = True
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{steps[0]}-{steps[-1]}.json.gz"
        done.export_chrome_trace(str(path))
        for line in summary(done.key_averages(), len(steps)):
            self._say(line)
        self._say(f"profile: {path}")


def summary(events: Any, steps: int) -> list[str]:
    """Return the lines of a summary: the parts of a step by the host's time, and the operations that took most.

    Operations are ordered by device time where a device was used, else by host time.

    Args:
        events: the profiler's averages by name; times are microseconds.
        steps: number of steps that were profiled.
    """
    by_name = {event.key: event for event in events if event.is_user_annotation}
    parts = [(part, by_name[part].cpu_time_total) for part in _PARTS if part in by_name]
    whole = sum(time for _, time in parts)
    shares = ", ".join(f"{part} {100 * time / max(whole, 1e-9):.1f} %" for part, time in parts)
    on_device = any(event.self_device_time_total for event in events)
    times = [
        (event.self_device_time_total if on_device else event.self_cpu_time_total, event)
        for event in events
        if not event.is_user_annotation
    ]
    spent = sum(time for time, _ in times)
    lines = [f"profile of {steps} steps: {whole / steps / 1e6:.3f} s a step on the host: {shares}"]
    lines.append(f"{'ms a step':>10} {'share':>7} {'calls':>7}  operation{' (device time)' if on_device else ''}")
    for time, event in sorted(times, key=lambda pair: -pair[0])[:_LINES]:
        share = 100 * time / max(spent, 1e-9)
        lines.append(f"{time / steps / 1e3:>10.2f} {share:>5.1f} % {event.count / steps:>7.1f}  {event.key[:70]}")
    return lines
