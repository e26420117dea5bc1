"""The command line. Parsing needs nothing heavy; each command imports what it uses when it runs."""

from __future__ import annotations

import argparse
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
Sampling follows LLaDA's published algorithm; --threshold settles every token that is sure enough instead of a fixed
number a step.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, or 2 after one line that says what is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Read by OpenMP when torch loads: threads that spin while they wait make two-thread matmuls up to ten times slower
    # as soon as another process wants a core; sleeping ones lose a few per cent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    parser = build_parser()
    try:
        arguments, rest = parser.parse_known_args(words)
        if rest and not getattr(arguments, "takes_overrides", False):
            raise ConfigError(f"unknown argument {rest[0]}; see `unmask {arguments.command} --help`")
        arguments.overrides = rest
        return arguments.run(arguments) or 0
    except UnmaskError as error:
        print(f"unmask: error: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `unmask … | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a place of the user's that no part of the program expected to fail
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"unmask: error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unmask: interrupted", file=sys.stderr)
        return 130


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
    _flag(parser, "nproc_per_node", type=int, default=1, metavar="N", help="processes to start (1: this one)")
    parser.set_defaults(takes_overrides=True)


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "answer prompts with a checkpoint", _GENERATE_HELP)
    _flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    _flag(parser, "prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    _flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    _flag(parser, "steps", type=int, default=128, help="denoising steps (default: %(default)s)")
    _flag(parser, "max_new_tokens", type=int, default=128, help="longest answer, in tokens (default: %(default)s)")
    _flag(parser, "block_size", type=int, default=32, help="tokens of a denoising block (default: %(default)s)")
    _flag(parser, "temperature", type=float, default=0.0, help="Gumbel noise; 0 is greedy (default: %(default)s)")
    _flag(parser, "remasking", default="low_confidence", help="low_confidence (default) or random")
    _flag(parser, "threshold", type=float, help="settle all tokens with at least this confidence; steps is then unused")
    _flag(parser, "cfg_scale", type=float, default=0.0, help="classifier-free guidance (default: %(default)s, off)")
    _flag(parser, "eos", default="allow", help="end-of-text token: allow (default), suppress or defer")
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
    from unmask.distributed.runtime import refuse_many_processes

    refuse_many_processes(arguments.nproc_per_node)
    loaded = load_config(arguments.config, arguments.overrides)
    from unmask.assemble import prepare, run_training

    prepared = prepare(loaded, weights=not arguments.dry_run)
    from rich.console import Console

    if arguments.dry_run:
        from unmask.preview import show_plan

        show_plan(prepared, Console())
        return 0
    outcome = run_training(prepared, Console())
    root = Path(prepared.config.checkpoint.checkpoint_dir).expanduser()
    print(f"{outcome.reason} after step {outcome.step}; run directory: {root}")
    if outcome.reason.startswith("SIG"):
        print("the same command resumes this run where it stopped")
    return 0


def _generate(arguments: argparse.Namespace) -> int | None:
    from unmask.sampling.settings import SamplerConfig

    names = ("steps", "max_new_tokens", "block_size", "temperature", "remasking", "threshold", "cfg_scale", "eos")
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
    from unmask.models.folders import find_folder

    folder = str(find_folder(arguments.checkpoint, "--checkpoint"))
    from unmask.distributed.runtime import pick_device
    from unmask.models.registry import load_model, plan_folder
    from unmask.models.tokenizer import load_tokenizer
    from unmask.training.export import tokenizer_folder

    plan_folder(folder, "--checkpoint")
    source = tokenizer_folder(folder, arguments.adapter)
    device = pick_device(arguments.device)
    tokenizer = load_tokenizer(str(source), "--checkpoint")
    model = load_model(folder, arguments.dtype, device, arguments.adapter)
    from unmask.sampling.generate import generate

    answers = generate(
        model,
        list(arguments.prompt),
        tokenizer=tokenizer,
        sampler=sampler,
        seed=arguments.seed,
        raw=arguments.raw,
        batch_size=arguments.batch_size,
    )
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
            "sampler": {name: getattr(sampler, name) for name in names},
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
