"""How long a person waits: `unmask --help`, and from `unmask train` to the first step of a small model."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bounds import at_most

# Bounds that the project promises, in seconds.
HELP_AT_MOST, FIRST_STEP_AT_MOST = 0.5, 8.0


def run(repeats: int = 5) -> dict[str, Any]:
    """Measure both as whole processes; return medians."""
    help_seconds = [_seconds([sys.executable, "-m", "unmask", "--help"]) for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        first_step = [_first_step(Path(folder), number) for number in range(3)]
    return {
        "help_seconds": statistics.median(help_seconds),
        "first_step_seconds": statistics.median(first_step),
        "bounds": {"help_at_most": HELP_AT_MOST, "first_step_at_most": FIRST_STEP_AT_MOST},
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as lines for people."""
    help_seconds, first_step = results["help_seconds"], results["first_step_seconds"]
    return (
        f"unmask --help          {help_seconds:.2f} s ({at_most(help_seconds, HELP_AT_MOST)})\n"
        f"command to first step  {first_step:.2f} s ({at_most(first_step, FIRST_STEP_AT_MOST)})"
    )


def _seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - start


def _first_step(folder: Path, number: int) -> float:
    """Return the seconds from starting the command to the time that the log gives for step 1."""
    from unmask.quickstart import configuration, make_problems, write_run
    from unmask.report.metrics import read_metrics

    root = folder / str(number)
    train, held_out = make_problems(2000, 20, seed=0)
    write_run(root, train, held_out, configuration(root, seed=0))
    words = [sys.executable, "-m", "unmask", "train", "-c", str(root / "quickstart.yaml")]
    words += [
        "--step_scheduler.max_steps",
        "1",
        "--step_scheduler.val_at_start",
        "false",
        "--lr_scheduler.lr_warmup_steps",
        "0",
    ]
    start = time.time()
    subprocess.run(words, check=True, capture_output=True)
    first = next(e for e in read_metrics(root / "run" / "metrics.jsonl") if e["event"] == "train")
    return first["time"] - start
