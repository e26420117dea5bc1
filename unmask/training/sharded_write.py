"""Shards of several ranks to the disk, and what a disk that does not take them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.distributed.ranks import Ranks

# How torch.save, whose writer drops the error of the system, reports that bytes did not reach their file.
_UNWRITTEN = ("inline_container", "PytorchStreamWriter")


def write_shards(tensors: dict[str, Any], folder: Path, ranks: Ranks) -> str | None:
    """Write all ranks' shards, which fails on all or on none; return what the disk said against it, and where."""
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        save(tensors, checkpoint_id=folder, process_group=ranks.group)
    except CheckpointException as error:
        return next(f"rank {rank}: {disk_problem(cause)}" for rank, (cause, _) in error.failures.items())
    return None


def disk_problem(error: BaseException) -> str:
    """Say what a failed write means; raise what is no failed write."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _UNWRITTEN):
        return "a file could not be written whole, so the disk is full or a limit is reached"
    raise error
