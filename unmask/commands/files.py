"""`unmask prep` and `unmask export`: a data set as chat JSONL, and a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unmask.config.flags import command, flag
from unmask.errors import ConfigError, choice_problem


def add(commands: Any) -> None:
    """Declare both commands."""
    parser = command(commands, "prep", prep, "write a data set as chat JSONL")
    parser.add_argument("dataset", metavar="DATASET", help="data set: gsm8k")
    flag(parser, "source", metavar="DIR", help="local copy with train.jsonl and test.jsonl (default: the hub)")
    flag(parser, "split", default="all", metavar="NAME", help="train, test or all (default: %(default)s)")
    flag(parser, "output", default=".", metavar="DIR", help="folder of the files (default: the current one)")
    parser = command(commands, "export", export, "write a plain Hugging Face folder, with the adapter merged")
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "output", required=True, metavar="DIR", help="new or empty folder")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to merge")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default: as stored)")


def prep(arguments: argparse.Namespace) -> int | None:
    """Write the data set; return the exit status."""
    from unmask.data.prep import PREPARERS

    if arguments.dataset not in PREPARERS:
        raise ConfigError(f"prep: {choice_problem(arguments.dataset, PREPARERS)}")
    for path in PREPARERS[arguments.dataset](arguments.source, Path(arguments.output), arguments.split):
        print(f"wrote {path}")
    return 0


def export(arguments: argparse.Namespace) -> int | None:
    """Write the checkpoint; return the exit status."""
    from unmask.training.export import export

    for warning in export(arguments.checkpoint, Path(arguments.output), arguments.adapter, arguments.dtype):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {arguments.output}")
    return 0
