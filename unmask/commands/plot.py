"""`unmask plot`: draw the loss curves of runs as an image."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import command, flag
from unmask.places import user_path


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "plot", run, "draw the loss curves of runs")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories; several are drawn together")
    flag(parser, "output", metavar="FILE.png", help="image to write (default: loss.png in the first run directory)")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.report.plots import find_log, plot_runs

    runs = [user_path(folder, "RUN_DIR") for folder in arguments.runs]
    for folder in runs:
        find_log(folder)
    output = user_path(arguments.output or runs[0] / "loss.png", "--output")
    print(f"wrote {plot_runs(runs, output)}")
    return 0
