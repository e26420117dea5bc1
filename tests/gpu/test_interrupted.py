"""Check 8: built, trained, saved in the background, killed and resumed, a run on a device is the run never stopped.

With FSDP2, its shards on the device or on the host: `test_cuda_sharding.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unmask.training.checkpoint import checkpoints, verify

pytestmark = pytest.mark.timeout(300)
STEPS = 6


def started(path: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "unmask.train", "-c", str(path), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "CI": "1"})


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return {event["step"]: event["loss"] for event in events if event["event"] == "train"}


def finish(path: Path, *words: str) -> None:
    process = started(path, *words)
    said = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 0, said


def test_killed_in_a_save_and_resumed_is_never_stopped(tiny, tmp_path: Path, device) -> None:
    run = tmp_path / "run"
    values = tiny.config(
        run, distributed__device=device.type, distributed__autocast_dtype="float32", step_scheduler__max_steps=STEPS,
        step_scheduler__ckpt_every_steps=2, model={"config": {**tiny.model, "d_model": 128, "mlp_hidden_size": 512}},
    )  # fmt: skip
    path = tiny.write(tmp_path / "run.yaml", values)
    process, until = started(path), time.monotonic() + 120
    while not list(run.glob(".step_*.part")) or not checkpoints(run):  # the second save has begun
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(losses(run), default=0)
    assert reached < STEPS
    for folder in checkpoints(run):
        verify(folder)
    finish(path)
    finish(path, "--checkpoint.checkpoint_dir", str(tmp_path / "whole"))
    ours, theirs = losses(run), losses(tmp_path / "whole")
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    if device.type == "cpu":
        assert ours == theirs
    else:  # sums of gradients have no fixed order there
        assert ours == pytest.approx(theirs, rel=1e-4)
