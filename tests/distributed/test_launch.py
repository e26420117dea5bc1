"""`unmask train --nproc-per-node N`: started, stopped and failed as one command. Slow: each process imports torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unmask.distributed.launch import launch
from unmask.errors import ConfigError
from unmask.report.metrics import read_metrics
from unmask.training.checkpoint import verify

slow = pytest.mark.slow


def start(path: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "unmask", "train", "-c", str(path), "--nproc-per-node", "2", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(root: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        log = root / "metrics.jsonl"
        if log.is_file() and any(e["event"] == "train" and e["step"] >= step for e in read_metrics(log)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step was made in two minutes")


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The launcher's children that train."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == process.pid and b"unmask.train" in words:
            found.append(int(folder.name))
    return sorted(found)


@pytest.fixture
def config(tiny, tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", step_scheduler__ckpt_every_steps=5))


def test_a_launcher_is_not_started_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        launch("unmask.train", [], 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="torchrun already"):
        launch("unmask.train", [], 2)


@slow
@pytest.mark.timeout(300)
def test_it_trains_and_says_so_once(config: Path, tmp_path: Path) -> None:
    process = start(config, "--step_scheduler.max_steps", "2")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0 and "Traceback" not in err and "error" not in err, err
    assert out.count("finished after step 2") == 1
    verify(tmp_path / "run" / "step_2")


@slow
@pytest.mark.timeout(300)
def test_a_signal_to_the_launcher_saves_and_ends_cleanly(config: Path, tmp_path: Path) -> None:
    process = start(config, "--step_scheduler.max_steps", "100000")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    assert "SIGTERM after step" in out and "the same command resumes this run" in out
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["reason"] == "SIGTERM"
    verify(tmp_path / "run" / f"step_{last['step']}")


@slow
@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_ends_the_command(config: Path, tmp_path: Path) -> None:
    process = start(config, "--step_scheduler.max_steps", "100000")
    wait_for_step(tmp_path / "run", 2, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1, (out, err)
    assert "killed by signal 9" in err or "another rank died" in err
    assert "Traceback" not in err


@slow
@pytest.mark.timeout(300)
def test_a_mistake_that_shows_after_the_start_has_its_own_status(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # a file where the run directory should be: rank 0 finds out
    process = start(config)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, (out, err)
    assert err.count("unmask: error:") == 1 and "checkpoint.checkpoint_dir" in err and "Traceback" not in err
