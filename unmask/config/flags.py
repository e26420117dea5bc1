"""Shared argparse helpers of the commands; the sampler's flags are the fields of `SamplerConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from unmask.config.distributed import check_timeout
from unmask.config.reader import described
from unmask.config.sampler import SamplerConfig
from unmask.errors import FieldError

# Heading in `--help` → settings that only some networks have.
_GROUPS = {
    "networks with a mask token (in brackets: the default)": (
        "block_size", "temperature", "remasking", "threshold", "factor", "cfg_scale", "refresh_interval",
        "revise_threshold",
    ),
    "networks with canvases (generation_config.json comes before the values in brackets)": (
        "t_min", "t_max", "stability_threshold", "confidence_threshold",
    ),
}  # fmt: skip
_METAVARS = {int: "N", float: "X", str: "NAME"}


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
    """Return every spelling of every option of a command."""
    return [spelling for action in parser._actions for spelling in action.option_strings]


def flag(parser: Any, name: str, **options: Any) -> None:
    """Add an option under both spellings, --two_words and --two-words."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*names, dest=name, **options)


def add_sampling_flags(parser: Any) -> None:
    """Add a flag for each sampler setting, without defaults: the model decides what is not given."""
    hints = typing.get_type_hints(SamplerConfig)
    groups = {title: parser.add_argument_group(title) for title in _GROUPS}
    group_of = {name: groups[title] for title, names in _GROUPS.items() for name in names}
    for name, text in described(SamplerConfig).items():
        kind = next((option for option in typing.get_args(hints[name]) if option in (int, float)), str)
        flag(group_of.get(name, parser), name, type=kind, metavar=_METAVARS[kind], help=text)


def add_device_flags(parser: Any, divided: str | None = None) -> None:
    """Add --dtype and --device, and the flags of several processes if `divided` says what these divide ("rows")."""
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default: as stored)")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="device (default: %(default)s)")
    add_verify_flag(parser)
    if divided is not None:
        said = f"processes to start on this machine; they divide the {divided}"
        flag(parser, "nproc_per_node", type=int, metavar="N", help=said)
        flag(parser, "shard", action="store_true", help="each process holds a part of the model, too big for one")
        said = f"how long a process waits for one that does not answer, its {divided} apart (30)"
        flag(parser, "timeout_minutes", type=_minutes, default=30.0, metavar="X", help=said)


def _minutes(text: str) -> float:
    try:
        check_timeout(float(text))
    except FieldError as error:
        raise argparse.ArgumentTypeError(error.problem) from None
    return float(text)


def add_verify_flag(parser: Any) -> None:
    """Add --no_verify."""
    flag(parser, "no_verify", action="store_true", help="do not compare a run's files with its manifest")


def sampler_from(arguments: argparse.Namespace) -> SamplerConfig:
    """Return the settings that were given.

    Raises:
        SamplingError: a value outside its range, or two that exclude each other.
    """
    return SamplerConfig(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplerConfig)})
