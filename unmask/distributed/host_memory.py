"""What a process does with memory of the host that it has freed."""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Whoever sets one of these has chosen how memory is allocated.
_CHOICES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for what is allocated next; return whether it does.

    glibc takes large blocks from the system one by one and gives each back when it is freed, so that a training step on
    a CPU, which makes and drops gradients and logits of hundreds of MB, pays a page fault for every 4 KB of them: with
    a large vocabulary a tenth of its time. Kept, they cost it once. The resident set then stays near its peak until the
    process ends, so this is for processes of our own that train.

    Other C libraries (musl, macOS, Windows) are left as they are, and so is a process whose environment says how
    memory is allocated (`MALLOC_TRIM_THRESHOLD_` and the like, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    if any(os.environ.get(name) for name in _CHOICES):
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        library.gnu_get_libc_version  # noqa: B018 (musl has a mallopt that does nothing)
    except (AttributeError, OSError, TypeError):
        return False
    # Blocks come from the heap, however large, and the heap never shrinks.
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
