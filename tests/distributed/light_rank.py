"""A rank that imports nothing heavy, for what the launcher makes of how ranks end: `python -m light_rank ENDING`."""

from __future__ import annotations

import os
import signal
import sys
import time

ending, rank = sys.argv[1], os.environ["RANK"]
if ending == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if ending == "mistake" and rank == "0":
    print("unmask: error: checkpoint.checkpoint_dir: a file is in the way", file=sys.stderr)
    sys.exit(2)
if ending != "well":
    time.sleep(60)  # as one that waits for the others, until the launcher ends it
