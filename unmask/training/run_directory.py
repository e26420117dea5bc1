"""One process at a time in a run directory, and no run that would wipe another's log there. Needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from unmask.config.results import CheckpointConfig
from unmask.errors import CheckpointError
from unmask.report.metrics import FILE
from unmask.training.checkpoint import checkpoints

LOCK = ".lock"


@contextlib.contextmanager
def hold_run_dir(root: Path, section: CheckpointConfig) -> Iterator[None]:
    """Create a run directory if need be and hold it; inside, no other process trains there.

    The lock ends with the context or with the process, however that dies; a `.lock` left behind locks nothing.

    Raises:
        CheckpointError: another process holds it, it cannot be written or locked, or checkpoints are off and an earlier
            run lies there.
    """
    prepare_run_dir(root)
    handle = _lock(root)
    try:
        _refuse_earlier_run(root, section)
        yield
    finally:
        (root / LOCK).unlink(missing_ok=True)  # while it is still locked, so that only our own can be removed
        os.close(handle)


def prepare_run_dir(root: Path) -> None:
    """Create a run directory and make sure that it can be written, before anything heavy starts.

    Raises:
        CheckpointError: a file in the way, or no permission.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.checkpoint_dir: {root} cannot be written ({error.strerror}); choose another folder"
        ) from None


def _lock(root: Path) -> int:
    """Return the open, locked lock file of a run directory, our process id in it."""
    path = root / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(_cannot_lock(root, error)) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise CheckpointError(
                f"checkpoint.checkpoint_dir: another process (pid {holder}) trains in {root}; wait for it or set "
                "checkpoint.checkpoint_dir to another folder"
            ) from None
        except OSError as error:
            os.close(handle)
            raise CheckpointError(_cannot_lock(root, error)) from None
        os.close(handle)  # its holder ended and removed it between our opening and our locking it


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _cannot_lock(root: Path, error: OSError) -> str:
    return (
        f"checkpoint.checkpoint_dir: {root} cannot be locked against a second run ({error.strerror}); choose a folder "
        "on a file system with locks"
    )


def _refuse_earlier_run(root: Path, section: CheckpointConfig) -> None:
    """Without checkpoints a run starts at step 1, and its log would replace the one that is there."""
    if section.enabled:
        return
    log = root / FILE
    if checkpoints(root) or (log.is_file() and log.stat().st_size > 0):
        raise CheckpointError(
            f"checkpoint.enabled: false would start again in {root} and wipe the log of the run that lies there; set "
            "checkpoint.checkpoint_dir to a new folder, or checkpoint.enabled: true to resume that run"
        )
