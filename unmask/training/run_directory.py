"""One process at a time in a run directory, and no run that would wipe another's log there. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from unmask.config.results import CheckpointConfig
from unmask.errors import CheckpointError
from unmask.models.folders import ADAPTER_CONFIG
from unmask.places import LOCK, hold
from unmask.report.metrics import FILE
from unmask.training.checkpoint import BEST, LATEST, checkpoints, remove_parts


@contextlib.contextmanager
def hold_run_dir(root: Path, section: CheckpointConfig) -> Iterator[None]:
    """Create a run directory if need be and hold it; inside, no other process trains there.

    The lock ends with the context or with the process, however that dies; a `.lock` left behind locks nothing.

    Raises:
        CheckpointError: another process holds it, it cannot be written or locked, or checkpoints are off and an earlier
            run lies there, or a model that no run wrote.
    """
    prepare_run_dir(root)
    with hold(root / LOCK, "checkpoint.checkpoint_dir", root, "trains in"):
        refuse_model_folder(root)
        _refuse_folders_for_links(root)
        remove_parts(root)
        _refuse_earlier_run(root, section)
        yield


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


def refuse_model_folder(root: Path) -> None:
    """Refuse a run directory in which a model or adapter lies: it could be taken for what the run trains.

    Raises:
        CheckpointError: naming its file.
    """
    for name in ("config.json", ADAPTER_CONFIG):
        if (root / name).exists():
            raise CheckpointError(
                f"checkpoint.checkpoint_dir: {root} holds {name}, which no run writes there: it is the folder of a "
                "model or adapter; choose a new folder (a run that lies there goes on once its step_*, latest and "
                "*.jsonl are moved to one)"
            )


def _refuse_folders_for_links(root: Path) -> None:
    """Refuse a copy of a run in which links became what they led to, before a save meets it."""
    for name in (LATEST, BEST):
        if (root / name).is_dir() and not (root / name).is_symlink():
            raise CheckpointError(
                f"checkpoint.checkpoint_dir: {root / name} is a folder where a run has a link to a checkpoint, as "
                "copies have that follow links; remove it or rename it to its step_N, and run again"
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
