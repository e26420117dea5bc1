"""`--nproc-per-node N`: start N processes of the same command through torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from unmask.distributed.processes import SHUTDOWN_TIMEOUT, STATUS_FILE
from unmask.errors import ConfigError
from unmask.machine import cores
from unmask.places import temporary_folder

_BY_SIGNAL = {
    signal.SIGKILL: ", perhaps because the machine ran out of memory",
    signal.SIGABRT: ", by itself (NCCL's watchdog does so when a collective fails or times out; see its lines above)",
}
_MOST_A_CORE = 8  # processes; each takes some hundred MB before it does anything
_GRACE = 600  # seconds that ranks get to save a checkpoint after a signal, before the launcher kills them


def launch(module: str, words: Sequence[str], processes: int) -> int:
    """Run `python -m MODULE WORDS…` in several processes on this machine and return the run's exit status.

    Raises:
        ConfigError: fewer than one process, or far more than cores, or this is already one of a launcher's processes.
    """
    if processes < 1:
        raise ConfigError(f"--nproc-per-node: must be at least 1, got {processes}")
    if processes > _MOST_A_CORE * cores():
        raise ConfigError(
            f"--nproc-per-node: {processes} processes on {cores()} cores would fill the machine's memory; start one a "
            f"device, and at most {_MOST_A_CORE} a core"
        )
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        raise ConfigError("--nproc-per-node: this process was started by torchrun already; give it to torchrun alone")
    # Threads are split fairly: more of them than cores make every rank wait for the slowest.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(_GRACE))
    warnings.filterwarnings("ignore", module="torch.distributed")
    # Each rank reports its own failure in one line; the launcher's summary of exit codes would bury it.
    for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with temporary_folder("unmask-launch-") as folder:
        note = folder / "status"
        os.environ[STATUS_FILE] = str(note)
        # Without a folder for logs, which are not written, torchrun leaves one behind each time.
        flags = ["--standalone", "--nproc-per-node", str(processes), "--log-dir", str(folder / "logs"), "-m", module]
        try:
            run(get_args_parser().parse_args([*flags, *words]))
        except ChildFailedError as error:
            return _failed(error)
        except SignalException as error:
            return int(note.read_text()) if note.is_file() else 128 + int(error.sigval)
        finally:
            del os.environ[STATUS_FILE]
    return 0


def relaunch(words: Sequence[str], processes: int) -> int:
    """Run this command line of `unmask`, which has `--nproc-per-node`, in several processes; return its exit status.

    Raises:
        ConfigError: as `launch`.
    """
    spellings = ("--nproc-per-node", "--nproc_per_node")
    rest, skip = [], False
    for word in words:
        if not skip and word not in spellings and word.partition("=")[0] not in spellings:
            rest.append(word)
        skip = not skip and word in spellings
    return launch("unmask", rest, processes)


def _failed(error: object) -> int:
    """Return the exit status of the rank that failed; say which one a signal killed, as it could not say so itself."""
    failures = dict(error.failures)  # pyright: ignore[reportAttributeAccessIssue]
    codes = [failure.exitcode for failure in failures.values()]
    statuses = [code for code in codes if code > 0]  # of ranks that ended by themselves
    if statuses:
        return max(statuses) if max(statuses) <= 2 else 1
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    print(
        f"unmask: error: rank {rank} was killed by signal {-failure.exitcode}"
        + _BY_SIGNAL.get(-failure.exitcode, "")
        + "; run again to resume from the last checkpoint",
        file=sys.stderr,
    )
    return 1
