"""Law: data workers end with their parent, however and whenever it ends; and never are there more than cores."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.popen_spawn_posix import Popen
from pathlib import Path

import pytest

from unmask import errors
from unmask.data.encode import Visit, encoded_ahead
from unmask.distributed import processes
from unmask.distributed.processes import data_workers
from unmask.errors import DataError, FieldError

ROOT = Path(processes.__file__).parents[2]
PARENT = """
import sys, time
sys.path.insert(0, {folder!r})

if __name__ == "__main__":  # workers import this module too, as they do the command's, which is as light
    from slow_encoder import Slow
    from unmask.data.encode import Visit, encoded_ahead

    rows = encoded_ahead(Slow(), (Visit(0, n, n) for n in range(10**6)), {workers}, 64)
    print("starting", flush=True)
    for _ in rows:
        print("encoded", flush=True)
        time.sleep(60)
"""
SLOW = """
import time

class Slow:
    def __reduce__(self):
        return arrive, ()

    def __call__(self, index, epoch):
        return index

def arrive():
    time.sleep({seconds})  # as imports of torch and transformers do
    return Slow()
"""


def living(marker: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait_for", "delay", "seconds"),
    [("encoded", 0.0, 0), *(("starting", delay, 60) for delay in (0.1, 0.6, 2.0))],
)
def test_no_worker_outlives_a_killed_parent(tmp_path: Path, wait_for: str, delay: float, seconds: int) -> None:
    marker = f"UNMASK_TEST_WORKER={tmp_path}"
    (tmp_path / "slow_encoder.py").write_text(SLOW.format(seconds=seconds))
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(tmp_path), workers=4))
    environment = {**os.environ, "UNMASK_TEST_WORKER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        while wait_for not in parent.stdout.readline():
            pass
        time.sleep(delay)
        started = len(living(marker))
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 15
    while (left := living(marker)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left and started >= 1


def test_no_more_workers_than_this_ranks_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [data_workers(asked) for asked in (0, 3, 8, 300)] == [0, 3, 8, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [data_workers(asked) for asked in (0, 1, 300)] == [0, 1, 2]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert data_workers(300) == 1


@pytest.mark.parametrize("fails", [1, 3])
def test_a_worker_that_cannot_be_started_leaves_none_of_the_others(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, starts, launch = multiprocessing.active_children(), iter(range(1, 100)), Popen._launch

    def refuse(self: Popen, process: object) -> None:
        if next(starts) == fails:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        launch(self, process)

    monkeypatch.setattr(Popen, "_launch", refuse)
    rows = encoded_ahead(max, (Visit(0, n, n) for n in range(100)), 4, 64)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="num_workers: a worker process could not be started .Cannot allocate memory"):
        next(rows)
    for process in set(multiprocessing.active_children()).difference(before):
        process.join(10)
    assert set(multiprocessing.active_children()) <= set(before)


def test_every_error_of_ours_comes_back_from_a_worker() -> None:
    assert str(copy.copy(FieldError("field", "is wrong"))) == "field: is wrong"  # made anew as a pickle makes it
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.UnmaskError) and error is not FieldError:
            assert str(copy.copy(error("what, where"))) == "what, where"
