"""`unmask prep`: write a data set as chat JSONL."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import command, flag
from unmask.errors import ConfigError, choice_problem
from unmask.places import user_path


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "prep", run, "write a data set as chat JSONL")
    parser.add_argument("dataset", metavar="DATASET", help="data set: gsm8k")
    flag(parser, "source", metavar="DIR", help="local copy with train.jsonl and test.jsonl (default: the hub)")
    flag(parser, "split", default="all", metavar="NAME", help="train, test or all (default: %(default)s)")
    flag(parser, "output", default=".", metavar="DIR", help="folder of the files (default: the current one)")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.data.prep import PREPARERS

    if arguments.dataset not in PREPARERS:
        raise ConfigError(f"prep: {choice_problem(arguments.dataset, PREPARERS)}")
    for path in PREPARERS[arguments.dataset](
        arguments.source, user_path(arguments.output, "--output"), arguments.split
    ):
        print(f"wrote {path}")
    return 0
