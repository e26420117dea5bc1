"""Freed memory is kept: the same tensors again cost no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from unmask.distributed.host_memory import keep_freed_memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these parameters")
def test_the_same_tensors_again_cost_no_page_faults() -> None:
    out = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True).stdout.split()
    kept, given_back, again = out[0], int(out[1]), int(out[2])
    assert kept == "True"
    assert given_back > 10_000  # pages of 4 KiB of 8 × 192 MiB, fewer where the system gives larger ones
    assert again < given_back / 20
