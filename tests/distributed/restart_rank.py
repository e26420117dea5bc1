"""`unmask train`, killed once: `python -m restart_rank RANK STEP WORDS…`; after torchrun's restart it goes on."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from unmask.cli import main
from unmask.training import loop

rank, step = sys.argv[1:3]
original, steps = loop.train_step, 0


def train_step(*arguments: Any) -> Any:
    """As the loop's, until the process is killed."""
    global steps
    steps += 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank and steps == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)


loop.train_step = train_step
sys.exit(main(["train", *sys.argv[3:]]))
