"""Errors of several ranks, each printed once: by the first rank that has it, not by those that only lost contact.

Ranks leave their message in the launcher's key-value store. The first to report a message prints it. Those that report
the same one print nothing; nor do those that only lost contact, where another has reported: they end with its exit
status. The traceback of an unexpected error is kept in a file, in the run directory where there is one, and the message
names it.

An error of a collective is of two sorts: another rank is gone, and the error does not say why, or the library, network
or device of this rank failed. They are told apart by the wording of torch 2.13 (gloo's transport, ProcessGroupNCCL.cpp,
NCCLUtils.cpp).
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

_PATIENCE = 3.0  # seconds that a rank which lost contact waits for the report of the one that failed
_WAIT = 0.05  # seconds between two looks for what another rank has found
_checks = itertools.count()  # numbers the calls of `own_share`, so that all ranks use the same keys
_LONGEST = 700  # characters of a cause
# Of an error that names gloo: another rank is gone or silent.
_GLOO_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection timed out",
    "socket closed",
    "broken pipe",
    "timed out waiting",
)
# Of NCCL's codes, those whose cause is on this rank; ncclInternalError may be of either sort (NVIDIA/nccl#795).
_NCCL_HERE = ("ncclsystemerror", "ncclinvalidusage", "ncclinvalidargument", "ncclunhandledcudaerror")
# Of any error: another rank is gone or silent.
_LOST = (
    "ncclremoteerror",
    "remote process exited",
    "closed by remote peer",
    "watchdog caught collective operation timeout",
    "nccl communicator was aborted",
    "possible application crash on rank",
    "application timeout caused pair closure",  # gloo, after a collective that timed out
)
_FRAMES = ("frame #", "exception raised from", "c++ capturedtraceback")  # lines that begin a C++ stack

_folder: list[Path] = []  # the run directory, once it is known: where tracebacks are kept


def keep_tracebacks_in(folder: Path) -> None:
    """Choose the folder for the tracebacks of this process; until then it is the system's for temporary files."""
    _folder[:] = [folder]


def report(message: str, status: int, key: str | None = None) -> int:
    """Print an error in one line, unless another rank has reported the same; return the exit status.

    Errors of the same `key` are the same error; by default the message is the key.
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
    if not isinstance(error, RuntimeError) or any(code in said for code in _NCCL_HERE):
        return False
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return any(words in said for words in _LOST) or ("gloo" in said and any(words in said for words in _GLOO_LOST))


def cause(error: BaseException) -> str:
    """Return an exception's message as one line, without the C++ stack.

    A long one is cut in its middle, since NCCL names the cause in its last lines.
    """
    lines = []
    for line in str(error).splitlines():
        if line.strip().lower().startswith(_FRAMES):
            break
        lines.append(line.strip())
    said = " ".join(filter(None, lines))
    return said if len(said) <= _LONGEST else f"{said[:200]} … {said[200 - _LONGEST :]}"


def report_failure(error: BaseException) -> int:
    """Report an unexpected exception on one of several ranks; return the exit status."""
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
    except Exception:  # the store went away with the rank that kept it, which reports its own error
        return 1
    return report(
        f"another rank died or did not answer within timeout_minutes: {cause(error)} ({_keep_traceback(error)}). The "
        "launcher names it above or below; run again to go on from what was saved",
        1,
    )


def own_share() -> Share:
    """Return this rank's part of a check of files that the ranks of a machine share; all call it, equally often."""
    number, size = next(_checks), local_size()
    store = _store() if size > 1 else None
    if store is None:  # each rank checks all files, and all find the same damage
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
        except Exception:  # the store went away with the rank that kept it, which reports its own error
            return damage

    return Share(local_rank(), size, tell)


def _key(text: str) -> str:
    """Return the store's key for a text, apart from those of earlier starts: the launcher may keep its store."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return f"unmask/{'/'.join(run)}/{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _store() -> Any:
    """Return the launcher's store, or that of the process group; None where neither can be reached."""
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return _agent_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if dist.is_initialized():
            return _get_default_store()
    except Exception:  # without a store each rank prints its error: better twice than not at all
        return None
    return None


@cache
def _agent_store(host: str, port: int) -> Any:
    """Connect to the store of torchrun's agent, once."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
