"""The command line. Parsing needs nothing heavy; each command imports what it uses when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from unmask.errors import ConfigError, SamplingError, UnmaskError

_TRAIN_HELP = """\
Any field of the configuration can be set after the file:  --optimizer.lr 1e-4  --step_scheduler.max_steps=200
A run directory with checkpoints is resumed, exactly. Ctrl-C and SIGTERM save a checkpoint and end the run cleanly.
"""

_GENERATE_HELP = """\
A prompt is one user turn through the checkpoint's chat template; --raw takes it literally.
Sampling follows the published algorithm of the checkpoint's family. What no flag sets is the checkpoint's own
(generation_config.json), or its family's; a flag of another family is refused.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, or 2 after one line that says what is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Read by OpenMP when torch loads: threads that spin while they wait make two-thread matmuls up to ten times slower
    # as soon as another process wants a core; sleeping ones lose a few per cent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    status = _run(build_parser(), words)
    if "WORLD_SIZE" in os.environ:  # one of several processes: nobody else tells the launcher how it ended
        from unmask.distributed.launch import leave_status

        leave_status(status)
    return status


def _run(parser: argparse.ArgumentParser, words: list[str]) -> int:
    try:
        arguments, rest = parser.parse_known_args(words)
        if rest and not getattr(arguments, "takes_overrides", False):
            raise ConfigError(f"unknown argument {rest[0]}; see `unmask {arguments.command} --help`")
        arguments.overrides = rest
        return arguments.run(arguments) or 0
    except UnmaskError as error:
        return _fail(str(error), error.exit_status)
    except BrokenPipeError:  # `unmask … | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a place of the user's that no part of the program expected to fail
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{place}{error.strerror or error}", 2)
    except RuntimeError as error:
        if "WORLD_SIZE" in os.environ:
            from unmask.distributed.failures import lost_contact, report_lost

            if lost_contact(error):
                return report_lost(error)
        raise
    except KeyboardInterrupt:
        print("unmask: interrupted", file=sys.stderr)
        return 130


def _fail(message: str, status: int) -> int:
    """Print an error in one line; of several processes that have the same one, one does."""
    if "WORLD_SIZE" not in os.environ:
        print(f"unmask: error: {message}", file=sys.stderr)
        return status
    from unmask.distributed.failures import report

    return report(message, status)


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with its mistakes reported as ours are: in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing and leaving."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    import unmask

    parser = _Parser(
        prog="unmask", description="Fine-tune, evaluate and run diffusion language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"unmask {unmask.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_quickstart, _add_train, _add_generate, _add_prep, _add_plot, _add_export):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str, more: str = ""
) -> Any:
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


def _flag(parser: Any, name: str, **options: Any) -> None:
    """Add an option under both spellings, --two_words and --two-words."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*spellings, dest=name, **options)


def _add_quickstart(commands: Any) -> None:
    parser = _command(
        commands, "quickstart", _quickstart, "train, evaluate and sample a small LLaDA on this CPU, no download"
    )
    _flag(parser, "output", default="quickstart", metavar="DIR", help="run directory (default: %(default)s)")
    _flag(parser, "seed", type=int, default=42, help="seed of data, weights and noise (default: %(default)s)")


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "fine-tune a model as a YAML file says", _TRAIN_HELP)
    parser.add_argument("-c", "--config", required=True, metavar="CONFIG.yaml", help="configuration of the run")
    _flag(parser, "dry_run", action="store_true", help="show what would be trained, then stop")
    _flag(parser, "nproc_per_node", type=int, metavar="N", help="processes to start on this machine")
    parser.set_defaults(takes_overrides=True)


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "answer prompts with a checkpoint", _GENERATE_HELP)
    _flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    _flag(parser, "prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    _flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    _flag(parser, "steps", type=int, help="denoising steps (LLaDA 128 an answer, DiffusionGemma 48 a canvas)")
    _flag(parser, "max_new_tokens", type=int, help="longest answer, in tokens (LLaDA 128, DiffusionGemma 256)")
    _flag(parser, "eos", help="end-of-text token: allow (default), suppress or (LLaDA) defer")
    llada = parser.add_argument_group("LLaDA")
    _flag(llada, "block_size", type=int, help="tokens of a denoising block (32)")
    _flag(llada, "temperature", type=float, help="Gumbel noise; 0 is greedy (0)")
    _flag(llada, "remasking", help="low_confidence (default) or random")
    _flag(llada, "threshold", type=float, help="settle all tokens with at least this confidence; steps is then unused")
    _flag(llada, "cfg_scale", type=float, help="classifier-free guidance (0, off)")
    gemma = parser.add_argument_group("DiffusionGemma (in brackets: where generation_config.json has nothing)")
    _flag(gemma, "entropy_bound", type=float, help="accept tokens whose summed entropy is within this, in nats (0.1)")
    _flag(gemma, "t_min", type=float, help="temperature towards a canvas's last step (0.4)")
    _flag(gemma, "t_max", type=float, help="temperature of a canvas's first step (0.8)")
    _flag(gemma, "stability_threshold", type=int, help="steps without change before a canvas may stop early (1)")
    _flag(gemma, "confidence_threshold", type=float, help="mean entropy below which it then stops, in nats (0.005)")
    _flag(parser, "raw", action="store_true", help="take prompts literally, without a chat template")
    _flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    _flag(parser, "batch_size", type=int, help="prompts denoised together")
    _flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    _flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    _flag(parser, "output", metavar="FILE.jsonl", help="write a record per answer instead of printing the texts")


def _add_prep(commands: Any) -> None:
    parser = _command(commands, "prep", _prep, "write a data set as chat JSONL")
    parser.add_argument("dataset", metavar="DATASET", help="gsm8k")
    _flag(parser, "source", metavar="DIR", help="local copy with train.jsonl and test.jsonl (default: the hub)")
    _flag(parser, "split", default="all", help="train, test or all (default: %(default)s)")
    _flag(parser, "output", default=".", metavar="DIR", help="where the files go (default: here)")


def _add_plot(commands: Any) -> None:
    parser = _command(commands, "plot", _plot, "draw loss curves from runs' own logs")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories; several are drawn together")
    _flag(parser, "output", metavar="FILE.png", help="default: loss.png in the first run directory")


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", _export, "write a plain Hugging Face folder, adapter merged")
    _flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    _flag(parser, "output", required=True, metavar="DIR", help="new folder")
    _flag(parser, "adapter", metavar="DIR", help="LoRA adapter to merge")
    _flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")


def _quickstart(arguments: argparse.Namespace) -> int | None:
    from unmask.quickstart import quickstart

    return quickstart(Path(arguments.output), arguments.seed)


def _train(arguments: argparse.Namespace) -> int | None:
    from unmask.config import load_config
    from unmask.distributed.ranks import process_rank, world_size

    processes = arguments.nproc_per_node or 1
    if arguments.nproc_per_node is not None and arguments.nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node: must be at least 1, got {arguments.nproc_per_node}")
    if processes > 1 and world_size() > 1:
        raise ConfigError("--nproc-per-node: torchrun started this process already; give the number to torchrun alone")
    loaded = load_config(arguments.config, arguments.overrides)
    from unmask.assemble import prepare, run_training

    prepared = prepare(loaded, weights=not arguments.dry_run, processes=processes if processes > 1 else None)
    if processes > 1 and not arguments.dry_run:
        from unmask.distributed.launch import launch

        return launch("unmask.train", ["-c", arguments.config, *arguments.overrides], processes)
    if arguments.dry_run and process_rank() > 0:
        return 0
    from rich.console import Console

    if arguments.dry_run:
        from unmask.preview import show_plan

        show_plan(prepared, Console())
        return 0
    outcome = run_training(prepared, Console())
    if process_rank() > 0:
        return 0
    root = Path(prepared.config.checkpoint.checkpoint_dir).expanduser()
    print(f"{outcome.reason} after step {outcome.step}; run directory: {root}")
    if outcome.reason.startswith("SIG"):
        print("the same command resumes this run where it stopped")
    return 0


def _generate(arguments: argparse.Namespace) -> int | None:
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


def _prep(arguments: argparse.Namespace) -> int | None:
    from unmask.data.prep import PREPARERS
    from unmask.sections import choice_problem

    if arguments.dataset not in PREPARERS:
        raise ConfigError(f"prep: {choice_problem(arguments.dataset, PREPARERS)}")
    for path in PREPARERS[arguments.dataset](arguments.source, Path(arguments.output), arguments.split):
        print(f"wrote {path}")
    return 0


def _plot(arguments: argparse.Namespace) -> int | None:
    from unmask.report.plots import find_log, plot_runs

    runs = [Path(run) for run in arguments.runs]
    for run in runs:
        find_log(run)
    output = Path(arguments.output) if arguments.output else runs[0] / "loss.png"
    print(f"wrote {plot_runs(runs, output)}")
    return 0


def _export(arguments: argparse.Namespace) -> int | None:
    from unmask.training.export import export

    for warning in export(arguments.checkpoint, Path(arguments.output), arguments.adapter, arguments.dtype):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {arguments.output}")
    return 0
