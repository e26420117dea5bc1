"""What the machine, or the container that this process runs in, lets it use: cores and memory. Needs no torch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")  # control groups, version 2


def cores() -> int:
    """Return how many cores this process may use: of its affinity, and of its container's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError):  # no limit is "max"; the uppermost group has no such file
            quota, period = (folder / "cpu.max").read_text().split()
            allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def host_memory() -> int:
    """Return the bytes of memory that this process may have: the machine's, or its container's."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError):
            most = min(most, int((folder / "memory.max").read_text()))
    return most


def available_memory() -> int:
    """Return the bytes of memory that this process may still take, of the machine's and of its container's."""
    least = host_memory()
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        least = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError):
            limit, taken = ((folder / name).read_text() for name in ("memory.max", "memory.current"))
            least = min(least, int(limit) - int(taken))
    return max(0, least)


def _groups() -> Iterator[Path]:
    """Yield the folder of each control group around this process, the innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    place = _CGROUPS / own.lstrip("/")
    for folder in (place, *place.parents):
        yield folder
        if folder == _CGROUPS:
            return
