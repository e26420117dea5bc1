"""Rows are encoded ahead of their use by worker processes, in order, with the same result as without them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from unmask.data.encode import Dropped, EncodedRow
from unmask.data.remember import RememberedRows
from unmask.errors import DataError

T = TypeVar("T")
Encode = Callable[[int], EncodedRow | Dropped]
_CHUNK = 16  # rows a task: sending one costs about as much as encoding one


def encoded_ahead(
    encode: Encode, candidates: Iterable[tuple[T, int]], num_workers: int, lookahead: int
) -> Iterator[tuple[T, int, EncodedRow | Dropped]]:
    """Yield (place, index, encode(index)) for each candidate (place, index), in their order.

    Args:
        encode: a function of the row's index alone; it must pickle if there are workers.
        candidates: may be endless.
        num_workers: processes; 0 encodes in this one, when the row is asked for, and remembers it.
        lookahead: rows that workers may be ahead.

    Raises:
        DataError: raised by `encode`, or a worker died.
    """
    if num_workers == 0:
        remembered = RememberedRows(encode)
        for place, index in candidates:
            yield place, index, remembered(index)
        return
    # Started afresh, never forked: this process has torch's threads, and perhaps a device, by now.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (encode,))
    remaining = iter(candidates)
    pending: deque[tuple[list[tuple[T, int]], Future[list[EncodedRow | Dropped]]]] = deque()
    tasks = max(2 * num_workers, -(-lookahead // _CHUNK))
    try:
        while True:
            while len(pending) < tasks and (chunk := list(islice(remaining, _CHUNK))):
                pending.append((chunk, pool.submit(_encode_chunk, [index for _, index in chunk])))
            if not pending:
                return
            chunk, future = pending.popleft()
            for (place, index), row in zip(chunk, future.result(), strict=True):
                yield place, index, row
    except BrokenProcessPool:
        raise DataError(
            "dataloader.num_workers: a worker process died, perhaps killed for want of memory; lower num_workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encode: Any = None  # set once in each worker, so that the encoder is sent once and not with every task


def _start_worker(encode: Encode) -> None:
    global _worker_encode
    _worker_encode = encode
    # A signal to the process group (Ctrl-C, a cluster's SIGTERM) is for the main process alone, which saves and stops.
    # SIGTERM itself must keep its effect here: with it the pool ends the workers that are left when one has died.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns once it is gone, however it went; a pool's worker would wait for work for ever
    os._exit(1)


def _encode_chunk(indices: list[int]) -> list[EncodedRow | Dropped]:
    return [_worker_encode(index) for index in indices]
