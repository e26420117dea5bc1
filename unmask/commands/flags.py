"""How every command declares itself and its options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str, more: str = ""
) -> Any:
    """Add a command; return its parser. `run` takes the parsed arguments and returns an exit status, None for 0."""
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def flag(parser: Any, name: str, **options: Any) -> None:
    """Add an option under both spellings, --two_words and --two-words."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*spellings, dest=name, **options)
