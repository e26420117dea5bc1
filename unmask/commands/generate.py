"""`unmask generate`: answer prompts with a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from unmask.commands.flags import command, flag
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
    flag(parser, "steps", type=int, help="denoising steps (LLaDA 128 an answer, DiffusionGemma 48 a canvas)")
    flag(parser, "max_new_tokens", type=int, help="longest answer, in tokens (LLaDA 128, DiffusionGemma 256)")
    flag(parser, "eos", help="end-of-text token: allow (default), suppress or (LLaDA) defer")
    llada = parser.add_argument_group("LLaDA")
    flag(llada, "block_size", type=int, help="tokens of a denoising block (32)")
    flag(llada, "temperature", type=float, help="Gumbel noise; 0 is greedy (0)")
    flag(llada, "remasking", help="low_confidence (default) or random")
    flag(llada, "threshold", type=float, help="settle all tokens with at least this confidence; steps is then unused")
    flag(llada, "cfg_scale", type=float, help="classifier-free guidance (0, off)")
    gemma = parser.add_argument_group("DiffusionGemma (in brackets: where generation_config.json has nothing)")
    flag(gemma, "entropy_bound", type=float, help="accept tokens whose summed entropy is within this, in nats (0.1)")
    flag(gemma, "t_min", type=float, help="temperature towards a canvas's last step (0.4)")
    flag(gemma, "t_max", type=float, help="temperature of a canvas's first step (0.8)")
    flag(gemma, "stability_threshold", type=int, help="steps without change before a canvas may stop early (1)")
    flag(gemma, "confidence_threshold", type=float, help="mean entropy below which it then stops, in nats (0.005)")
    flag(parser, "raw", action="store_true", help="take prompts literally, without a chat template")
    flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    flag(parser, "batch_size", type=int, help="prompts denoised together")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    flag(parser, "output", metavar="FILE.jsonl", help="write a record per answer instead of printing the texts")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.settings import SamplerConfig, default_settings, resolve

    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    sampler = SamplerConfig(**{name: getattr(arguments, name) for name in names})
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
    from unmask.models.registry import load_model, plan_folder
    from unmask.models.tokenizer import load_tokenizer
    from unmask.training.export import tokenizer_folder

    plan = plan_folder(folder, "--checkpoint")
    settings = resolve(sampler, default_settings(plan.config, read_generation(Path(folder))))
    source = tokenizer_folder(folder, arguments.adapter)
    device = own_device(pick_device(arguments.device))
    ranks = join(device)
    tokenizer = load_tokenizer(str(source), "--checkpoint")
    model = load_model(folder, arguments.dtype, device, arguments.adapter)
    from unmask.sampling.generate import generate

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
