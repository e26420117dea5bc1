"""`unmask generate`: answer prompts with a checkpoint, or fill the blanks of texts."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import add_place_flags, add_sampling_flags, command, flag, sampler_from

_GENERATE_HELP = """\
A prompt is one user turn through the checkpoint's chat template; --raw takes it literally.
Sampling follows the published algorithm of the checkpoint's family. What no flag sets is the checkpoint's own
(generation_config.json), or its family's; a flag of another family is refused. What is not exact says so: in the flag's
help, and in each record.

Many prompts:  --input prompts.jsonl --output answers.jsonl   a line holds "prompt", "messages" or "prompt_ids"; an
               interrupted job goes on where it stopped when the same command is given again.
Blanks:        --infill --prompt "The capital of{blank:4} is Paris."   A text with blanks is plain; in one with --raw a
               control token that is spelt out is that token.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "generate", run, "answer prompts with a checkpoint", _GENERATE_HELP)
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "prompt", action="append", metavar="TEXT", help="may be given several times")
    flag(parser, "input", metavar="FILE.jsonl", help="prompts, one JSON object a line")
    flag(parser, "infill", action="store_true", help="fill the {blank:N}s of the prompts")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    add_sampling_flags(parser)
    flag(parser, "raw", action="store_true", help="take prompts literally: no chat template, control tokens as spelt")
    flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    flag(parser, "batch_size", type=int, help="prompts denoised together (16)")
    add_place_flags(parser, "prompts")
    flag(parser, "output", metavar="FILE.jsonl", help="write a record per answer instead of printing the texts")
    flag(parser, "watch", action="store_true", help="draw each answer while it is denoised, one after the other")
    flag(parser, "trace", metavar="FILE.html", help="write a page that replays how the answers came about")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.plan import Asked, check_blank_sampler, plan_job
    from unmask.sampling.prompts import given_prompts

    sampler = sampler_from(arguments)
    if arguments.infill:
        check_blank_sampler(sampler)
    prompts = given_prompts(arguments.prompt, arguments.input, arguments.infill)
    asked = Asked(
        prompts, arguments.infill, arguments.raw, arguments.seed, arguments.batch_size, arguments.output,
        arguments.watch, arguments.trace,
    )  # fmt: skip
    plan = plan_job(arguments.checkpoint, sampler, arguments.adapter)
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    from unmask.sampling.answers import answer_all

    answer_all(plan, asked, arguments.dtype, arguments.device, arguments.shard)
    return 0
