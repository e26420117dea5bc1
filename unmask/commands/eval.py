"""`unmask eval`: measure checkpoints on tasks, side by side."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from unmask.config.flags import add_sampling_flags, command, flag, sampler_from
from unmask.errors import ConfigError
from unmask.evaluation.tasks import TASKS, split_names

_HELP = """\
tasks on --data, a JSONL file of chats (messages) or of question/answer, prompt/completion or problem/answer columns:
{tasks}
Any other name is a task of lm-evaluation-harness (pip install 'unmask[eval]'); lm_eval/NAME names its task where both
have one.

--output holds every answer; the same command goes on where it was interrupted. An --adapter belongs to the --checkpoint
before it:  unmask eval --checkpoint BASE --checkpoint BASE --adapter RUN --tasks gsm8k --data test.jsonl
"""


def add(commands: Any) -> None:
    """Declare the command."""
    about = "\n".join(f"  {name:<12}{task.about}" for name, task in TASKS.items())
    parser = command(commands, "eval", run, "measure checkpoints on tasks, side by side", _HELP.format(tasks=about))
    flag(parser, "checkpoint", action=_Checkpoint, required=True, metavar="DIR_OR_HUB_ID",
         help="folder, run directory or hub id; may be given several times")  # fmt: skip
    flag(parser, "adapter", action=_Adapter, metavar="DIR", help="LoRA adapter of the checkpoint before it")
    flag(parser, "tasks", nargs="+", required=True, metavar="NAME", help="tasks, separated by blanks or commas")
    flag(parser, "data", metavar="FILE.jsonl", help="questions and answers of our own tasks")
    flag(parser, "prompt_column", metavar="NAME", help="column of the questions, where rows are no chats")
    flag(parser, "completion_column", metavar="NAME", help="column of the answers")
    flag(parser, "limit", type=int, metavar="N", help="the first N rows of each task; each N is another evaluation")
    flag(parser, "few_shot", type=int, metavar="N", help="worked examples before each question (0)")
    flag(parser, "shots_file", metavar="FILE.jsonl", help="the first rows of this file are the worked examples")
    flag(parser, "raw", action="store_true", help="ask in literal text, without a chat template (base models)")
    flag(parser, "output", default="evaluation", metavar="DIR", help="folder of answers and results (%(default)s)")
    flag(parser, "against", metavar="DIR", help="--output of an earlier evaluation; count the answers that differ")
    flag(parser, "seed", type=int, default=42, help="seed of draws and masks (default: %(default)s)")
    flag(parser, "batch_size", type=int, help="rows that the network sees at once (16)")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    flag(parser, "nproc_per_node", type=int, metavar="N", help="processes to start on this machine; they share rows")
    flag(parser, "shard", action="store_true", help="each process holds a part of the model, too big for one")
    likelihood = parser.add_argument_group("likelihoods")
    flag(likelihood, "num_samples", type=int, help="masks an answer (128), or noise levels of DiffusionGemma (32)")
    flag(likelihood, "antithetic", action="store_true", help="draw masks in complementary pairs")
    harness = parser.add_argument_group("lm-evaluation-harness")
    flag(harness, "include_path", metavar="DIR", help="folder with further task files")
    flag(harness, "apply_chat_template", action="store_true", help="render its prompts with the chat template")
    add_sampling_flags(parser)


class _Checkpoint(argparse.Action):
    """Collects [checkpoint, adapter] pairs."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.checkpoint = [*(namespace.checkpoint or []), (values, None)]


class _Adapter(argparse.Action):
    """Gives its value to the checkpoint before it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        pairs = namespace.checkpoint or []
        if not pairs or pairs[-1][1] is not None:
            raise ConfigError(f"--adapter: {values} belongs to no checkpoint; give it right after its --checkpoint")
        namespace.checkpoint = [*pairs[:-1], (pairs[-1][0], values)]


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.evaluation.job import EvalJob, Likelihoods, plan_job

    options = {field.name: getattr(arguments, field.name) for field in fields(EvalJob) if field.name in arguments}
    options |= {
        "checkpoints": arguments.checkpoint,
        "tasks": split_names(arguments.tasks),
        "sampler": sampler_from(arguments),
        "likelihoods": Likelihoods(arguments.num_samples, arguments.antithetic),
    }
    if arguments.nproc_per_node is not None and arguments.nproc_per_node < 1:
        raise ConfigError(f"--nproc_per_node: must be at least 1, got {arguments.nproc_per_node}")
    plan = plan_job(EvalJob(**options))
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    from unmask.evaluation.run import run_job

    run_job(plan, arguments.device)
    return 0
