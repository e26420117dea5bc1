"""`unmask chat`: a conversation in the terminal, in which answers appear as they are denoised."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import add_device_flags, add_sampling_flags, command, flag, sampler_from
from unmask.distributed.processes import world_size
from unmask.errors import ConfigError

_CHAT_HELP = """\
Each line is a turn; /help lists the commands (/reset, /steps N, /seed N, /save FILE.jsonl, /quit). Ctrl-C stops an
answer, Ctrl-D leaves. When the conversation outgrows the model's context, the oldest turns are left out, with a note.
If standard input is not a terminal, every line is answered in turn and the first error ends the command.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "chat", run, "talk with a checkpoint and see its answers being denoised", _CHAT_HELP)
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    flag(parser, "system", metavar="TEXT", help="a system turn before the conversation")
    text = "name of a packaged template, or a .jinja file (default: the tokenizer's)"
    flag(parser, "chat_template", metavar="NAME_OR_FILE", help=text)
    add_sampling_flags(parser)
    flag(parser, "seed", type=int, default=42, metavar="N", help="seed of the draws (default: %(default)s)")
    add_device_flags(parser)


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.plan import plan_job

    if world_size() > 1:
        raise ConfigError("chat: one terminal talks with one process; start it without a launcher")
    sampler = sampler_from(arguments)
    plan = plan_job(arguments.checkpoint, sampler, arguments.adapter, verify=not arguments.no_verify)
    from unmask.sampling.chat import converse

    given = arguments.seed, arguments.system, arguments.chat_template, arguments.dtype, arguments.device
    return converse(plan, sampler, *given)
