"""Freed memory is kept: the same tensors again cost no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from unmask.distributed.runtime import _CHOICES

COUNT = """
import resource, torch
from unmask.distributed.runtime import keep_freed_memory

def faults(times=8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24), torch.ones(2**25)  # 64 and 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
kept = keep_freed_memory()
faults()
print(kept, given_back, faults())
"""


def faults(**environment: str) -> list[str]:
    """Return what COUNT prints: whether memory is kept, and the page faults before and after."""
    keep = {name: value for name, value in os.environ.items() if name not in _CHOICES}
    out = subprocess.run(
        [sys.executable, "-c", COUNT], check=True, capture_output=True, text=True, env=keep | environment
    )
    return out.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these parameters")
def test_the_same_tensors_again_cost_no_page_faults() -> None:
    kept, given_back, again = faults()
    assert kept == "True"
    assert int(given_back) > 10_000  # pages of 4 KiB of 8 × 192 MiB, fewer where the system gives larger ones
    assert int(again) < int(given_back) / 20


def test_who_chose_how_memory_is_allocated_keeps_that() -> None:
    assert faults(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
