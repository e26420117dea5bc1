"""Loaders of several ranks in one process: each runs in a thread, and they exchange rows as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from unmask.data.loader import TrainLoader


def together(make: Callable[..., TrainLoader], world: int, steps: int) -> list[list[Any]]:
    """Return the first steps of each rank's loader, `make(rank=, world_size=, gather=)`; what one raises is raised."""
    barrier = threading.Barrier(world, timeout=20)
    values: list[Any] = [None] * world

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait()
        everyone = list(values)
        barrier.wait()  # nobody writes the next value before all have read this one
        return everyone

    def run(rank: int) -> list[Any]:
        try:
            return list(islice(make(rank=rank, world_size=world, gather=partial(gather, rank)), steps))
        except threading.BrokenBarrierError:
            raise AssertionError(f"rank {rank} waited for an exchange that another does not make") from None

    with ThreadPoolExecutor(world) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(world)]]
