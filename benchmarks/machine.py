"""What this machine can do at best, measured now: matmul rate and copy rate, for the counted floors."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """Rates of this machine.

    Attributes:
        flops: operations a second of a large matmul (a multiply-add counts as two).
        bytes: bytes a second of a large copy, read and written bytes both counted.
        threads: threads that torch used.
    """

    flops: float
    bytes: float
    threads: int


def measure(repeats: int = 5, dtype: torch.dtype = torch.float32) -> Machine:
    """Measure both rates, matmuls in `dtype`; the best of several runs: a floor is what is possible undisturbed."""
    left, right = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    flops = 2 * 2048 * 1024 * 4096 / _best(lambda: left @ right, repeats)
    rate = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), repeats)
    return Machine(flops, rate, torch.get_num_threads())


def _best(action, repeats: int) -> float:  # noqa: ANN001
    action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
