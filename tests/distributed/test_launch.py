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

from unmask.cli import main
from unmask.distributed.launch import launch, relaunch
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


@slow
@pytest.mark.timeout(300)
def test_ranks_of_a_killed_launcher_save_and_end_and_its_folder_goes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    among = tmp_path / "temporary"
    among.mkdir()
    monkeypatch.setenv("TMPDIR", str(among))
    process = start(config, "--step_scheduler.max_steps", "100000", "--dataloader.num_workers", "1")
    wait_for_step(tmp_path / "run", 3, process)
    started = family(process.pid)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=100)  # the ranks have the same pipes: until they have ended
    assert "Traceback" not in err and "error" not in err and out.count("SIGTERM after step") == 1, (out, err)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["reason"] == "SIGTERM"
    verify(tmp_path / "run" / f"step_{last['step']}")
    until = time.monotonic() + 15
    while any(map(alive, started)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(started) >= 5 and not [each for each in started if alive(each)]  # launcher, ranks, workers
    assert [path.name.startswith(f"unmask-launch-{process.pid}-") for path in among.glob("unmask-launch-*")] == [True]
    done = start(config, "--step_scheduler.max_steps", "3")  # which it has made already
    done.communicate(timeout=100)
    assert done.returncode == 0 and not [*among.glob("unmask-*"), *among.glob("torchelastic_*")]


def family(process: int) -> list[int]:
    """Return a process's number and those of all that it has started, directly or not."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(each for child in children for each in family(int(child)))]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


@pytest.mark.parametrize(
    ("enabled", "store", "said"),
    [
        ("false", "False", "checkpoint.enabled: false, and torchrun starts again after a failure (--max-restarts 3)"),
        ("true", "True", "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
    ],
)
def test_restarts_that_could_not_go_on_are_refused_at_the_start(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    enabled: str, store: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", store)
    assert main(["train", "-c", str(config), "--checkpoint.enabled", enabled]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@slow
@pytest.mark.timeout(300)
def test_torchrun_restarts_a_run_that_goes_on(tiny, train_tiny, tmp_path: Path) -> None:
    """A rank is killed after a checkpoint: torchrun starts all again, and the losses are those of one that lived."""
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=6, step_scheduler__ckpt_every_steps=2)
    path = tiny.write(tmp_path / "run.yaml", values)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         "-m", "restart_rank", "1", "5", "-c", str(path)],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
             "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [event["resumed_from"] for event in events if event["event"] == "run"] in (
        [None, "step_2"],
        [None, "step_4"],  # where its save was complete already
    )
    assert events[-1]["event"] == "end" and events[-1]["step"] == 6
    other = read_metrics(train_tiny({**values, "checkpoint": {"checkpoint_dir": str(tmp_path / "alone")}}).root
                         / "metrics.jsonl")  # fmt: skip
    for mine, theirs in zip(*([e for e in each if e["event"] == "train"] for each in (events, other)), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_far_more_processes_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match="--nproc-per-node: 100000 processes on [0-9]+ cores"):
        relaunch(["generate", "--nproc-per-node", "100000"], 100000)
