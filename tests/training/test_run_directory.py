"""A run directory belongs to one process at a time, and no run wipes another's log."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import main
from unmask.config.results import CheckpointConfig
from unmask.errors import CheckpointError
from unmask.training.run_directory import LOCK, hold_run_dir, prepare_run_dir

ON, OFF = CheckpointConfig(), CheckpointConfig(enabled=False)
HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from unmask.config.results import CheckpointConfig\n"
    "from unmask.training.run_directory import hold_run_dir\n"
    "with hold_run_dir(Path(sys.argv[1]), CheckpointConfig()):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with hold_run_dir(tmp_path / "run", ON):
        with pytest.raises(CheckpointError) as caught, hold_run_dir(tmp_path / "run", ON):
            raise AssertionError("two processes in one directory")
        said = str(caught.value)
        assert f"another process (pid {os.getpid()}) trains in {tmp_path / 'run'}" in said and "\n" not in said
        with hold_run_dir(tmp_path / "other", ON):
            pass
    with hold_run_dir(tmp_path / "run", ON):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_killed_process_holds_nothing(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    tiny.write(tmp_path / "run.yaml", tiny.config(root))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert main(["train", "-c", str(tmp_path / "run.yaml")]) == 2
        assert f"another process (pid {holder.pid})" in capsys.readouterr().err
        assert [path.name for path in root.iterdir()] == [LOCK]
        holder.kill()
    assert (root / LOCK).exists()
    with hold_run_dir(root, ON):
        pass


def test_a_lock_file_removed_by_its_holder_in_between_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    original, removed = fcntl.flock, []

    def flock(handle: int, operation: int) -> None:
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(True)
        original(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold_run_dir(tmp_path, ON):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"cannot be locked .*No locks available"), hold_run_dir(tmp_path, ON):
        pass


@pytest.mark.parametrize("left", ["step_3/", "metrics.jsonl"])
def test_without_checkpoints_an_earlier_run_is_not_wiped(tmp_path: Path, left: str) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with hold_run_dir(tmp_path, OFF):  # an empty log is nobody's
        pass
    if left.endswith("/"):
        (tmp_path / left).mkdir()
    else:
        (tmp_path / left).write_text('{"event": "train", "step": 1}\n')
    with pytest.raises(CheckpointError) as caught, hold_run_dir(tmp_path, OFF):
        pass
    said = str(caught.value)
    assert str(tmp_path) in said and "checkpoint.checkpoint_dir" in said and "checkpoint.enabled: true" in said
    assert not (tmp_path / LOCK).exists()
    with hold_run_dir(tmp_path, ON):
        pass


def test_the_log_of_a_run_survives_one_without_checkpoints(
    tiny, train_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    first = train_tiny(tiny.config(tmp_path, step_scheduler__max_steps=1))
    with pytest.raises(CheckpointError, match=r"checkpoint\.enabled"):
        train_tiny(tiny.config(tmp_path, step_scheduler__max_steps=1, checkpoint__enabled=False))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(first.events)


def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(CheckpointError, match=r"checkpoint\.checkpoint_dir: .*taken.* cannot be written"):
            prepare_run_dir(place)
    prepare_run_dir(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_copy_whose_links_became_folders_is_refused_before_a_save_meets_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with (
        pytest.raises(CheckpointError, match=rf"{name} is a folder where a run has a link"),
        hold_run_dir(tmp_path, ON),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_leftovers_of_every_sort_go(tmp_path: Path) -> None:
    (tmp_path / ".step_2.1.old.part").touch()  # a file that stood where a checkpoint goes
    (tmp_path / ".step_4.1.part").mkdir()
    (tmp_path / ".latest.1").symlink_to("step_2")
    (tmp_path / "step_2").mkdir()
    (tmp_path / ".step_6.1.part").symlink_to("step_2")
    with hold_run_dir(tmp_path, ON):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "step_2"]
