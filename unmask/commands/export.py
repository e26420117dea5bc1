"""`unmask export`: write a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from unmask.config.flags import add_verify_flag, command, flag
from unmask.places import user_path


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "export", run, "write a plain Hugging Face folder, with the adapter merged")
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "output", required=True, metavar="DIR", help="new or empty folder")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to merge")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default: as stored)")
    flag(parser, "strip_prefix", action="store_true", help="take a wrapper's prefix (_orig_mod., …) off the tensors")
    add_verify_flag(parser)


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.training.export import export

    output = user_path(arguments.output, "--output")
    for warning in export(
        arguments.checkpoint, output, arguments.adapter, arguments.dtype, arguments.strip_prefix,
        not arguments.no_verify,
    ):  # fmt: skip
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {arguments.output}")
    return 0
