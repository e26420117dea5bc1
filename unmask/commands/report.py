"""`unmask report`: show runs side by side on one HTML page."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import command, flag
from unmask.places import user_path

_REPORT_HELP = """\
The page needs nothing but itself: what differs between the configurations, curves, validation by noise level,
evaluations, sample answers and the environment, in light or dark.
Evaluations that lie inside a run directory are found; --evaluation names others.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "report", run, "show runs side by side on one HTML page", _REPORT_HELP)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories")
    parser.add_argument("-o", "--output", metavar="FILE.html", help="default: report.html in the first run")
    flag(parser, "evaluation", action="append", metavar="DIR", help="output of `unmask eval`; repeat for several")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.report.plots import find_log
    from unmask.report.report import write_report

    folders = [user_path(folder, "RUN_DIR") for folder in arguments.runs]
    evaluations = [user_path(folder, "--evaluation") for folder in arguments.evaluation or ()]
    output = user_path(arguments.output or find_log(folders[0]).parent / "report.html", "--output")
    print(f"wrote {write_report(folders, output, evaluations)}")
    return 0
