"""The SLURM script of docs/distributed.md, with stand-ins for SLURM's commands: it saves, then queues itself again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
trap 'sleep 0.3; echo saved >> "$LOG"; exit 1' TERM
echo ready >> "$LOG"
[ -z "$ENDS_WITH" ] || exit "$ENDS_WITH"
for _ in $(seq 200); do sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node1; echo node2; else echo "scontrol $*" >> "$LOG"; fi
"""


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text = (request.config.rootpath / "docs" / "distributed.md").read_text()
    (found,) = re.findall(r"```text\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)
    path = tmp_path / "job.sh"
    path.write_text(found)
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    return path


def start(script: Path, ends_with: str = "") -> subprocess.Popen:
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "17"}
    mine = {"PATH": f"{script.parent}:{os.environ['PATH']}", "LOG": str(script.parent / "log"), "ENDS_WITH": ends_with}
    return subprocess.Popen(["bash", str(script)], env={**os.environ, **slurm, **mine})


def test_it_is_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_at_the_time_limit_the_run_saves_and_the_job_is_queued_again(script: Path) -> None:
    log, process = script.parent / "log", start(script)
    for _ in range(200):
        if log.is_file() and "ready" in log.read_text():
            break
        time.sleep(0.05)
    time.sleep(0.2)  # until the script waits
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@300
    process.wait(30)
    first, *rest = log.read_text().splitlines()
    assert first.startswith("srun torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 17 ") and "node1:29500" in first
    assert rest == ["ready", "saved", "scontrol requeue 17"]


@pytest.mark.parametrize("status", ["0", "2"])
def test_a_run_that_ends_by_itself_is_not_queued_again(script: Path, status: str) -> None:
    assert start(script, status).wait(30) == int(status)
    assert "scontrol" not in (script.parent / "log").read_text()
