"""`unmask generate`: answer prompts with a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from unmask.commands.flags import command, flag
from unmask.commands.sampling_flags import add_sampling_flags, sampler_from
from unmask.errors import ConfigError, SamplingError

_GENERATE_HELP = """\
A prompt is one user turn through the checkpoint's chat template; --raw takes it literally.
Sampling follows the published algorithm of the checkpoint's family. What no flag sets is the checkpoint's own
(generation_config.json), or its family's; a flag of another family is refused.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "generate", run, "answer prompts with a checkpoint", _GENERATE_HELP)
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    add_sampling_flags(parser)
    flag(parser, "raw", action="store_true", help="take prompts literally, without a chat template")
    flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    flag(parser, "batch_size", type=int, help="prompts denoised together")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    flag(parser, "nproc_per_node", type=int, metavar="N", help="processes to start on this machine; they share prompts")
    flag(parser, "shard", action="store_true", help="each process holds a part of the model, too big for one")
    flag(parser, "output", metavar="FILE.jsonl", help="write a record per answer instead of printing the texts")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.settings import default_settings, resolve

    sampler = sampler_from(arguments)
    for prompt in arguments.prompt:
        if not prompt.strip():
            raise SamplingError("--prompt: the text is empty; write what the model should answer")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise SamplingError(f"--batch_size: must be at least 1, got {arguments.batch_size}")
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: {output.absolute().parent} is no folder; create it first")
    if output is not None and output.is_dir():
        raise ConfigError(f"--output: {output} is a folder; name a file in it")
    if arguments.adapter is not None:
        from unmask.models.adapter_folder import find_adapter

        find_adapter(arguments.adapter)
    from unmask.models.folders import find_folder, read_generation

    folder = str(find_folder(arguments.checkpoint, "--checkpoint"))
    from unmask.distributed.ranks import join
    from unmask.distributed.rows import divide_rows
    from unmask.distributed.runtime import own_device, pick_device
    from unmask.models.registry import plan_folder
    from unmask.models.tokenizer import load_tokenizer
    from unmask.training.export import tokenizer_folder

    plan = plan_folder(folder, "--checkpoint")
    settings = resolve(sampler, default_settings(plan.config, read_generation(Path(folder))))
    source = tokenizer_folder(folder, arguments.adapter)
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    device = own_device(pick_device(arguments.device))
    ranks = join(device)
    tokenizer = load_tokenizer(str(source), "--checkpoint")
    from unmask.distributed.answering import load_for_answers
    from unmask.sampling.generate import generate

    model, together = load_for_answers(folder, arguments.dtype, device, arguments.adapter, ranks, arguments.shard)
    answers = divide_rows(
        list(arguments.prompt),
        ranks,
        lambda prompts: generate(
            model,
            prompts,
            tokenizer=tokenizer,
            sampler=sampler,
            seed=arguments.seed,
            raw=arguments.raw,
            batch_size=arguments.batch_size,
        ),
        together,
    )
    if not ranks.first:
        return 0
    if output is None:
        for prompt, answer in zip(arguments.prompt, answers, strict=True):
            print(f"> {prompt}\n{answer.text}\n" if len(answers) > 1 else answer.text)
        return 0
    records = [
        {
            "prompt": prompt,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "seed": arguments.seed,
            "sampler": dataclasses.asdict(settings),
            "nfe": answer.stats.nfe,
            "tokens_per_forward": round(answer.stats.tokens_per_forward, 3),
            "tokens_per_second": round(answer.stats.tokens_per_second, 3),
        }
        for prompt, answer in zip(arguments.prompt, answers, strict=True)
    ]
    temporary = output.with_name(output.name + ".part")
    temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    temporary.replace(output)
    print(f"wrote {len(records)} records to {output}")
    return 0
