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
    parser.set_defaults(run=run, parser=parser)
    return parser


def spellings(parser: argparse.ArgumentParser) -> list[str]:
    """Return all options of a command as they may be written."""
    return [spelling for action in parser._actions for spelling in action.option_strings]


def flag(parser: Any, name: str, **options: Any) -> None:
    """Add an option under both spellings, --two_words and --two-words."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*names, dest=name, **options)
