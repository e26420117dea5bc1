"""A worker process that encodes rows. This module imports next to nothing, so that a worker that has just begun, before
it imports what its task needs, watches its parent already."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_INTERVAL = 0.2  # seconds between two looks at the parent

_encode: Any = None  # set once in each worker, so that the encoder is sent once and not with every task


class Start:
    """Initializer of a pool: sets a worker's encoder. It is unpickled ahead of it, and then the watch begins."""

    def __reduce__(self) -> tuple[Callable[[int], Callable[[Any], None]], tuple[int]]:
        return _begin, (os.getpid(),)

    def __call__(self, encode: Any) -> None:
        raise AssertionError("runs in workers, where `_set` takes its place")


def encode_chunk(chunk: list[tuple[int, int]]) -> list[Any]:
    """Encode rows, given as (index, epoch), in a worker."""
    return [_encode(index, epoch) for index, epoch in chunk]


def _begin(parent: int) -> Callable[[Any], None]:
    # A signal to the process group (Ctrl-C, a cluster's SIGTERM) is for the main process alone, which saves and stops.
    # SIGTERM itself must keep its effect here: with it the pool ends the workers that are left when one has died.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    return _set


def _set(encode: Any) -> None:
    global _encode
    _encode = encode


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:  # a process whose parent died, however it did, gets another
        time.sleep(_INTERVAL)
    os._exit(1)
