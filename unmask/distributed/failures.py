"""One message for one failure: of many ranks that stop, the one that has something to say says it, once.

Ranks leave their message in the launcher's key-value store. The first to report a message prints it; those that report
the same one, or only lost contact with a rank that reported, stay silent and leave with its exit status.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from datetime import timedelta
from threading import Event
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from unmask.distributed.processes import local_rank, local_size, process_rank, world_size
from unmask.models.manifest import Share

_PATIENCE = 3.0  # seconds in which a rank that broke down gets its own report into the store
_WAIT = 0.05  # seconds between two looks for what another rank has found
_checks = itertools.count()
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
    "broken pipe",
    "remote process exited",
    "connection refused",
    "timeout",
    "timed out waiting",
    "nccl",
)


def report(message: str, status: int) -> int:
    """Print an error in one line, unless another rank has said the same; return the exit status."""
    try:
        size, rank = world_size(), process_rank()
    except Exception:  # the launcher's variables are what is wrong
        size, rank = 1, 0
    if size == 1:
        print(f"unmask: error: {message}", file=sys.stderr, flush=True)
        return status
    store = _store()
    try:
        first = store is None or store.add(_key(message), 1) == 1
        if store is not None:
            store.set(_key("status"), str(status))
            store.add(_key("reports"), 1)
    except Exception:  # the store went away with the rank that kept it
        first = True
    if first:
        named = "" if rank == 0 else f"rank {rank}: "
        print(f"unmask: error: {named}{message}", file=sys.stderr, flush=True)
    return status


def lost_contact(error: BaseException) -> bool:
    """Say whether an exception means that a collective failed because another rank is gone."""
    said = str(error).lower()
    return isinstance(error, (dist.DistError, RuntimeError)) and (
        isinstance(error, dist.DistError) or any(words in said for words in _LOST)
    )


def report_lost(error: BaseException) -> int:
    """Wait for the rank that broke down to report; say that contact was lost when none does. Return the exit status."""
    store, until = _store(), time.monotonic() + _PATIENCE
    try:
        while store is not None and time.monotonic() < until:
            if store.add(_key("reports"), 0) > 0:
                return int(store.get(_key("status")))
            time.sleep(0.1)
    except Exception:  # the store went away with the rank that kept it, which speaks for itself
        return 1
    said = str(error).split("\n")[0][:160]
    return report(
        f"another rank died or did not answer within distributed.timeout_minutes ({said}); the launcher names it "
        "above or below. Run again to resume from the last checkpoint",
        1,
    )


def own_share() -> Share:
    """Return this rank's part of a check of files, shared among those of its machine; all call it, equally often."""
    number, size = next(_checks), local_size()
    store = _store() if size > 1 else None
    if store is None:  # each checks all, and all say the same
        return Share()
    first = process_rank() - local_rank()

    def tell(damage: str | None, stopped: Event) -> str | None:
        try:
            store.set(_key(f"check {number} {process_rank()}"), damage or "")
            found = []
            for rank in range(first, first + size):
                while not store.check([key := _key(f"check {number} {rank}")]):
                    if stopped.wait(_WAIT):
                        return damage
                found.append(store.get(key).decode())
            return next(filter(None, found), None)
        except Exception:  # the store went away with the rank that kept it, which speaks for itself
            return damage

    return Share(local_rank(), size, tell)


def _key(text: str) -> str:
    """Return a key of this start of the run: the launcher may keep its store over restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return f"unmask/{'/'.join(run)}/{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _store() -> Any:
    """Return the launcher's store, or that of the process group; None when there is none to be had."""
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            return dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        if dist.is_initialized():
            return _get_default_store()
    except Exception:  # nothing to coordinate with: better said twice than not at all
        return None
    return None
