"""`unmask quickstart`: train, evaluate and sample a small model."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import command, flag
from unmask.places import user_path


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "quickstart", run, "train, evaluate and sample a small model on this CPU, no download")
    flag(parser, "output", default="quickstart", metavar="DIR", help="folder of the run (default: %(default)s)")
    flag(parser, "seed", type=int, default=42, metavar="N", help="seed of data and weights (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.quickstart import quickstart

    return quickstart(user_path(arguments.output, "--output"), arguments.seed, own_process=True)
