"""Where a rank of a test starts. It imports nothing heavy: the test's own process loads it only to name `main`."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from pathlib import Path


def main(environment: dict[str, str], note: str, program: str, arguments: tuple) -> None:
    """Run one rank: its result goes into the file `note`, what it prints beside it."""
    os.environ.update(environment)
    import rank_programs
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch's own, in a process that pytest does not watch
    sys.stdout = sys.stderr = Path(note + ".err").open("w", buffering=1)
    result = getattr(rank_programs, program)(*arguments)
    Path(note).write_bytes(pickle.dumps(result))
    from unmask.distributed.ranks import leave

    leave(10.0)
