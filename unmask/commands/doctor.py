"""`unmask doctor`: examine this machine, a run's configuration on it, or a checkpoint, before time is spent."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config import load_config
from unmask.config.flags import command, flag
from unmask.errors import ConfigError, UnmaskError

if TYPE_CHECKING:
    from unmask.doctor.subject import Subject

_HELP = """\
Without an argument it looks at the machine alone: versions, devices, kernels, the way to the hub. A YAML file is looked
at as `unmask train` would run it, fields set after it included; a folder, run directory or hub id as `unmask generate`
would load it. Nothing is trained, downloaded but configuration and tokenizer, or written.

Each line is one finding: ok, note (worth knowing, or not checked here), warning or error, with its remedy.
Exit status: 0 without warnings, 1 with a warning, 2 with an error.
"""
_STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "red"}


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "doctor", run, "examine this machine, a configuration or a checkpoint", _HELP)
    parser.add_argument("subject", nargs="?", metavar="CONFIG.yaml|DIR|HUB_ID", help="what to examine on this machine")
    flag(parser, "nproc_per_node", type=int, metavar="N", help="processes that the configuration is for")
    flag(parser, "json", action="store_true", help="print one JSON object: status, and findings with check, level, "
         "what, remedy")  # fmt: skip
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from rich.console import Console
    from rich.text import Text

    subject = _subject(arguments)
    from unmask.doctor.examine import examine
    from unmask.doctor.findings import exit_status

    console, found = Console(soft_wrap=True), []
    for check, finding in examine(subject):
        found.append((check, finding))
        if not arguments.json:
            console.print(Text(f"{finding.level:8}", _STYLES[finding.level]), Text(f"{check:10}{finding.text}"), sep="")
    status = exit_status(finding for _, finding in found)
    if arguments.json:
        rows = [{"check": check, **vars(finding)} for check, finding in found]
        print(json.dumps({"status": status, "findings": rows}, indent=1))
    return status


def _subject(arguments: argparse.Namespace) -> Subject:
    name, processes = arguments.subject, arguments.nproc_per_node
    if processes is not None and processes < 1:
        raise ConfigError(f"--nproc-per-node: must be at least 1, got {processes}")
    is_run = name is not None and (name.endswith((".yaml", ".yml")) or Path(name).is_file())
    if not is_run and (arguments.overrides or processes is not None):
        odd = arguments.overrides[0] if arguments.overrides else "--nproc-per-node"
        raise ConfigError(
            f"{odd}: belongs to a run, and no configuration is named before it; see `unmask doctor --help`"
        )
    from unmask.doctor import subject

    if name is None:
        return subject.machine()
    if not is_run:
        return subject.checkpoint(name)
    try:
        return subject.run(name, load_config(name, arguments.overrides), processes)
    except UnmaskError as error:
        return subject.unread(name, error)
