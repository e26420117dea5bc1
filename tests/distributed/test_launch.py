"""`unmask train --nproc-per-node N`: started, stopped and failed as one command."""

from __future__ import annotations

import os
import pickle
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
def test_a_signal_to_the_launcher_saves_and_ends_cleanly(config: Path, tmp_path: Path) -> None:
    process = start(config, "--step_scheduler.max_steps", "100000")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "Traceback" not in err and "error" not in err, (out, err)
    assert out.count("SIGTERM after step") == 1 and "the same command resumes this run" in out
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["reason"] == "SIGTERM"
    verify(tmp_path / "run" / f"step_{last['step']}")


SAID = {
    "well": (0, ""),
    "killed": (1, "unmask: error: rank 1 was killed by signal 9, perhaps because the machine ran out of memory"),
    "mistake": (2, "unmask: error: checkpoint.checkpoint_dir: a file is in the way"),
}


@pytest.mark.parametrize("ending", SAID)
def test_how_ranks_end_is_how_the_command_ends(start_ranks, tmp_path: Path, ending: str) -> None:
    """Each rank's own line and its status, nothing of the launcher's; the ranks that live are ended."""
    status, said = SAID[ending]
    (process,) = start_ranks(tmp_path, 1, "launched", "light_rank", [ending], 2)
    process.join(90)
    assert process.exitcode == 0
    assert pickle.loads((tmp_path / "rank0").read_bytes()) == status
    lines = (tmp_path / "rank0.err").read_text().splitlines()
    assert len(lines) == (1 if said else 0) and all(line.startswith(said) for line in lines)
