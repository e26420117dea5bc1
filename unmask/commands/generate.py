"""`unmask generate`: answer prompts with a checkpoint, or fill the blanks of texts."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config.flags import add_device_flags, add_sampling_flags, command, flag, sampler_from

_GENERATE_HELP = """\
A prompt is one user turn, rendered by the checkpoint's chat template; --raw takes it literally.
By default sampling follows the published algorithm of the checkpoint's family, with the settings of its
generation_config.json. A flag that the model's sampler does not have is refused.

Many prompts:  --input prompts.jsonl --output answers.jsonl
               A line holds "prompt", "messages", "conversations" or "prompt_ids".
               The same command continues an interrupted job.
Fill blanks:   --infill --prompt "The capital of{blank:4} is Paris."
               Each {blank:N} is N tokens; no chat template is applied.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "generate", run, "answer prompts with a checkpoint", _GENERATE_HELP)
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "prompt", action="append", metavar="TEXT", help="a prompt; repeat for several")
    flag(parser, "input", metavar="FILE.jsonl", help="read prompts from a file, one JSON object a line")
    flag(parser, "infill", action="store_true", help="fill each {blank:N} in the prompts with N tokens")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    add_sampling_flags(parser)
    flag(parser, "raw", action="store_true", help="take prompts literally: no chat template, control tokens as spelt")
    flag(parser, "seed", type=int, default=42, metavar="N", help="seed of the draws (default: %(default)s)")
    flag(parser, "batch_size", type=int, metavar="N", help="prompts denoised together (default: 16)")
    add_device_flags(parser, "prompts")
    flag(parser, "output", metavar="FILE.jsonl", help="write one JSON record an answer instead of printing the texts")
    flag(parser, "watch", action="store_true", help="draw each answer while it is denoised, one after the other")
    flag(parser, "trace", metavar="FILE.html", help="write an HTML page that replays the denoising call by call")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.plan import GenerateRequest, check_blank_sampler, plan_job
    from unmask.sampling.prompts import given_prompts

    sampler = sampler_from(arguments)
    if arguments.infill:
        check_blank_sampler(sampler)
    prompts = given_prompts(arguments.prompt, arguments.input, arguments.infill)
    request = GenerateRequest(
        prompts, arguments.infill, arguments.raw, arguments.seed, arguments.batch_size, arguments.output,
        arguments.watch, arguments.trace,
    )  # fmt: skip
    plan = plan_job(arguments.checkpoint, sampler, arguments.adapter, verify=not arguments.no_verify)
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    from unmask.sampling.answers import answer_all

    answer_all(plan, request, arguments.dtype, arguments.device, arguments.shard, arguments.timeout_minutes)
    return 0
