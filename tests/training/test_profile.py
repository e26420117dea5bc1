"""`unmask train --profile N` writes a trace of N steps and says where their time went; training is the same."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import main


def test_a_trace_of_the_steps_that_were_asked_for(tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    plain = train_tiny(tiny.config(tmp_path / "plain"))
    profiled = train_tiny(tiny.config(tmp_path / "run"), profile=2)
    assert profiled.losses == plain.losses
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "step_3-4.json.gz" and f"profile: {trace}" in profiled.output
    names = [event.get("name") for event in json.loads(gzip.open(trace).read())["traceEvents"]]
    assert all(part in names for part in ("data", "corrupt", "forward and loss", "backward", "clip and update"))
    assert names.count("backward") == 2 * names.count("data") / 1  # two micro-batches a step
    said = profiled.output.splitlines()
    (line,) = [line for line in said if line.startswith("profile of 2 steps: ")]
    shares = [float(share.rsplit(" ", 2)[-2]) for share in line.split(": ")[2].split(", ")]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert any("aten::" in line for line in said[said.index(line) :])


@pytest.mark.parametrize(("asked", "trace"), [(50, "step_3-6.json.gz"), (3, "step_3-5.json.gz")])
def test_a_run_that_ends_before(
    tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path, asked: int, trace: str
) -> None:
    train_tiny(tiny.config(tmp_path / "run"), profile=asked)
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == [trace]


def test_a_run_of_two_steps_has_nothing_to_profile(tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    done = train_tiny(tiny.config(tmp_path / "run", step_scheduler__max_steps=2), profile=1)
    assert "nothing was profiled, since only 2 steps were made" in done.output
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "0"], "--profile: must be at least 1, got 0"),
        (["--profile", "2", "--dry-run"], "--profile: a dry run makes no steps"),
    ],
)
def test_what_cannot_be_profiled(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-c", "run.yaml", *words]) == 2
    assert said in capsys.readouterr().err
