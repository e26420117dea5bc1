"""`unmask generate`: answer prompts with a checkpoint, or fill the blanks of texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.commands.flags import command, flag
from unmask.commands.sampling_flags import add_sampling_flags, sampler_from
from unmask.errors import ConfigError, SamplingError

if TYPE_CHECKING:
    from unmask.distributed.ranks import Ranks
    from unmask.sampling.answer_file import AnswerFile
    from unmask.sampling.settings import SamplerConfig, Settings

_GENERATE_HELP = """\
A prompt is one user turn through the checkpoint's chat template; --raw takes it literally.
Sampling follows the published algorithm of the checkpoint's family. What no flag sets is the checkpoint's own
(generation_config.json), or its family's; a flag of another family is refused. What is not exact says so: in the flag's
help, and in each record.

Many prompts:  --input prompts.jsonl --output answers.jsonl   a line holds "prompt", "messages" or "prompt_ids"; an
               interrupted job goes on where it stopped when the same command is given again.
Blanks:        --infill --prompt "The capital of {blank:4} is Paris."   {blank:2-6} tries several lengths.
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
    flag(parser, "raw", action="store_true", help="take prompts literally, without a chat template")
    flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    flag(parser, "batch_size", type=int, help="prompts denoised together (16)")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    flag(parser, "nproc_per_node", type=int, metavar="N", help="processes to start on this machine; they share prompts")
    flag(parser, "shard", action="store_true", help="each process holds a part of the model, too big for one")
    flag(parser, "output", metavar="FILE.jsonl", help="write a record per answer instead of printing the texts")
    flag(parser, "watch", action="store_true", help="draw each answer while it is denoised, one after the other")
    flag(parser, "trace", metavar="FILE.html", help="write a page that replays how the answers came about")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.settings import default_settings, resolve

    sampler = sampler_from(arguments)
    prompts = _prompts(arguments)
    _check(arguments)
    from unmask.models.folders import find_folder, read_generation

    folder = str(find_folder(arguments.checkpoint, "--checkpoint"))
    from unmask.distributed.ranks import join
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
    if ranks.size > 1 and (arguments.watch or arguments.trace):
        raise ConfigError("--watch and --trace show what one process does; start one, or leave them out")
    output = _output(arguments, prompts, settings, ranks)
    tokenizer = load_tokenizer(str(source), "--checkpoint")
    from unmask.distributed.answering import load_for_answers

    model, together = load_for_answers(folder, arguments.dtype, device, arguments.adapter, ranks, arguments.shard)
    if arguments.watch or arguments.trace:
        answers = _shown(arguments, model, prompts, tokenizer, sampler, settings)
    else:
        answers = _shared(arguments, model, prompts, tokenizer, sampler, settings, ranks, together, output)
    if output is not None:
        output.finish({row: _record(arguments, prompts[row], answers[row], settings) for row in answers})
    if not ranks.first:
        return 0
    if output is not None:
        kept = f", {len(output.kept)} of them from before" if output.kept else ""
        print(f"wrote {len(prompts)} records to {arguments.output}{kept}")
    elif not arguments.watch:
        for row, answer in answers.items():
            print(f"> {_title(prompts[row])}\n{answer.text}\n" if len(answers) > 1 else answer.text)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Any]:
    if (arguments.prompt is None) == (arguments.input is None):
        raise ConfigError("give --prompt TEXT, once or several times, or --input FILE.jsonl")
    for prompt in arguments.prompt or []:
        if not prompt.strip():
            raise SamplingError("--prompt: the text is empty; write what the model should answer")
    if arguments.input is not None:
        from unmask.sampling.prompt_file import read_prompts

        return read_prompts(Path(arguments.input), arguments.infill)
    return list(arguments.prompt)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be told before anything is loaded."""
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise SamplingError(f"--batch_size: must be at least 1, got {arguments.batch_size}")
    for name in ("output", "trace"):
        value = getattr(arguments, name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise ConfigError(f"--{name}: {Path(value).absolute().parent} is no folder; create it first")
        if value is not None and Path(value).is_dir():
            raise ConfigError(f"--{name}: {value} is a folder; name a file in it")
    if arguments.adapter is not None:
        from unmask.models.adapter_folder import find_adapter

        find_adapter(arguments.adapter)


def _output(
    arguments: argparse.Namespace, prompts: Sequence[Any], settings: Settings, ranks: Ranks
) -> AnswerFile | None:
    if arguments.output is None:
        return None
    from unmask.sampling.answer_file import AnswerFile

    given = {name: getattr(arguments, name) for name in ("checkpoint", "adapter", "dtype", "infill", "raw", "seed")}
    return AnswerFile(Path(arguments.output), prompts, {**given, "sampler": _in_force(settings)}, ranks)


def _sampled(arguments: argparse.Namespace, model: Any, tokenizer: Any, sampler: SamplerConfig) -> Callable[..., list]:
    """Return `generate` or `infill` with everything but the prompts."""
    from unmask.sampling.generate import generate
    from unmask.sampling.infill import infill

    options: dict[str, Any] = {"tokenizer": tokenizer, "sampler": sampler, "seed": arguments.seed, "raw": arguments.raw}

    def sample(prompts: Sequence[Any], **more: Any) -> list:
        return (infill if arguments.infill else generate)(model, list(prompts), **options, **more)

    return sample


def _shown(
    arguments: argparse.Namespace, model: Any, prompts: list[Any], tokenizer: Any, sampler: SamplerConfig,
    settings: Settings,
) -> dict[int, Any]:  # fmt: skip
    """Answer while the terminal or a trace follows; all prompts, an interrupted job's answers among them."""
    from unmask.sampling.trace import trace_for
    from unmask.sampling.view import watcher

    sample = _sampled(arguments, model, tokenizer, sampler)
    checkpoint = arguments.checkpoint
    trace = trace_for(model, tokenizer, settings, prompts, checkpoint=checkpoint, seed=arguments.seed)
    titles = {row: _title(prompt) for row, prompt in enumerate(prompts)} if len(prompts) > 1 else {}
    with watcher(model, tokenizer, sampler, titles=titles) if arguments.watch else nullcontext() as draw:

        def follow(event: Any) -> None:
            for one in (draw, trace if arguments.trace else None):
                if one is not None:
                    one(event)

        try:
            answers = sample(prompts, batch_size=1 if arguments.watch else arguments.batch_size, on_event=follow)
        finally:
            if arguments.trace:
                trace.write(Path(arguments.trace))
    if arguments.trace:
        print(f"wrote {arguments.trace}")
    return dict(enumerate(answers))


def _shared(
    arguments: argparse.Namespace, model: Any, prompts: list[Any], tokenizer: Any, sampler: SamplerConfig,
    settings: Settings, ranks: Ranks, together: AbstractContextManager, output: AnswerFile | None,
) -> dict[int, Any]:  # fmt: skip
    """Answer what is not answered yet, divided among the ranks; each answer goes to the file as it comes."""
    from unmask.distributed.rows import divide_rows, own_rows
    from unmask.report.progress import AnswerProgress
    from unmask.sampling.answer_file import canonical

    sample = _sampled(arguments, model, tokenizer, sampler)
    todo = list(range(len(prompts))) if output is None else output.open
    rows = [canonical(prompts[row]) for row in todo]
    mine = [todo[place] for place in own_rows(rows, ranks)]
    with AnswerProgress(len(mine), shown=ranks.first and output is not None) as progress:

        def arrived(place: int, answer: Any) -> None:
            if output is not None:
                output.add(mine[place], _record(arguments, prompts[mine[place]], answer, settings))
            progress.answered(len(answer.token_ids))

        def answer(_: list[str]) -> list[Any]:
            own = [prompts[row] for row in mine]
            return sample(own, batch_size=arguments.batch_size, on_answer=arrived)

        return dict(zip(todo, divide_rows(rows, ranks, answer, together), strict=True))


def _record(arguments: argparse.Namespace, prompt: Any, answer: Any, settings: Settings) -> dict[str, Any]:
    from unmask.sampling.answer_file import record_of

    return record_of(prompt, answer, _in_force(settings), arguments.seed)


def _in_force(settings: Settings) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "approximations": list(settings.approximations)}


def _title(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return prompt[-1]["content"] if isinstance(prompt[0], dict) else f"{len(prompt)} token ids"
