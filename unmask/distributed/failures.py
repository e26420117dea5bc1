"""One message for one failure: of many ranks that stop, the one that has something to say says it, once.

Ranks leave their message in the launcher's key-value store. The first to report a message prints it; those that report
the same one, or only lost contact with a rank that reported, stay silent and leave with its exit status. The traceback
of what nobody foresaw is kept in a file, in the run directory where there is one, and the message names it.

An error of a collective is of two sorts: the other side is gone, which says nothing of why, or this rank's own library,
network or device failed. The words are those of torch 2.13 (gloo's transport, ProcessGroupNCCL.cpp, NCCLUtils.cpp).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from unmask.distributed.processes import local_rank, local_size, process_rank, world_size
from unmask.models.manifest import Share

_PATIENCE = 3.0  # seconds in which a rank that broke down gets its own report into the store
_WAIT = 0.05  # seconds between two looks for what another rank has found
_checks = itertools.count()
_LONGEST = 700  # characters of a cause
# Of an error that names gloo: the other side is gone or silent.
_GLOO_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection timed out",
    "socket closed",
    "broken pipe",
    "timed out waiting",
)
# Of NCCL's codes, those whose cause is on this rank; ncclInternalError may be either (NVIDIA/nccl#795).
_NCCL_OWN = ("ncclsystemerror", "ncclinvalidusage", "ncclinvalidargument", "ncclunhandledcudaerror")
_LOST = (
    "ncclremoteerror",
    "remote process exited",
    "closed by remote peer",
    "watchdog caught collective operation timeout",
    "nccl communicator was aborted",
    "possible application crash on rank",
    "application timeout caused pair closure",  # gloo, after a collective that timed out
)
_FRAMES = ("frame #", "exception raised from", "c++ capturedtraceback")

_folder: list[Path] = []  # where tracebacks are kept, once the run directory is known


def keep_tracebacks_in(folder: Path) -> None:
    """Choose the folder of the tracebacks of this process; before, the system's for temporary files."""
    _folder[:] = [folder]


def report(message: str, status: int, key: str | None = None) -> int:
    """Print an error in one line, unless another rank has said the same; return the exit status.

    `key` is what the same means, by default the message.
    """
    try:
        size, rank = world_size(), process_rank()
    except Exception:  # the launcher's variables are what is wrong
        size, rank = 1, 0
    if size == 1:
        print(f"unmask: error: {message}", file=sys.stderr, flush=True)
        return status
    store = _store()
    try:
        first = store is None or store.add(_key(key or message), 1) == 1
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
    if not isinstance(error, RuntimeError) or any(code in said for code in _NCCL_OWN):
        return False
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return any(words in said for words in _LOST) or ("gloo" in said and any(words in said for words in _GLOO_LOST))


def cause(error: BaseException) -> str:
    """Return what an exception says in one line, its last lines too, where NCCL names the cause; without C++ frames."""
    lines = []
    for line in str(error).splitlines():
        if line.strip().lower().startswith(_FRAMES):
            break
        lines.append(line.strip())
    said = " ".join(filter(None, lines))
    return said if len(said) <= _LONGEST else f"{said[:200]} … {said[200 - _LONGEST :]}"


def report_failure(error: BaseException) -> int:
    """Report an exception that nobody foresaw on one of several ranks; return the exit status."""
    if lost_contact(error):
        return _report_lost(error)
    said = f"{type(error).__name__}: {cause(error)}"
    more = ". NCCL_DEBUG=INFO says more" if "nccl" in said.lower() else ""
    return report(f"{said}{more} ({_keep_traceback(error)})", 1, said)


def _keep_traceback(error: BaseException) -> str:
    """Write an exception's traceback to a file; return where it is, as a message says it."""
    written = f"{time.ctime()}, rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}\n"
    written += "".join(traceback.format_exception(error))
    for folder in (*_folder, Path(tempfile.gettempdir())):
        try:
            handle, name = tempfile.mkstemp(".txt", f"traceback-rank{os.environ.get('RANK')}-", folder)
            with open(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(written)
        except OSError:
            continue
        return f"traceback: {name} on {socket.gethostname()}"
    print(written, file=sys.stderr, flush=True)
    return "traceback above"


def _report_lost(error: BaseException) -> int:
    """Wait for the rank that broke down to report; say that contact was lost when none does. Return the exit status."""
    store, until = _store(), time.monotonic() + _PATIENCE
    try:
        while store is not None and time.monotonic() < until:
            if store.add(_key("reports"), 0) > 0:
                return int(store.get(_key("status")))
            time.sleep(0.1)
    except Exception:  # the store went away with the rank that kept it, which speaks for itself
        return 1
    return report(
        f"another rank died or did not answer within timeout_minutes: {cause(error)} ({_keep_traceback(error)}). The "
        "launcher names it above or below; run again to go on from what was saved",
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
            return _agent_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if dist.is_initialized():
            return _get_default_store()
    except Exception:  # nothing to coordinate with: better said twice than not at all
        return None
    return None


@cache
def _agent_store(host: str, port: int) -> Any:
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
