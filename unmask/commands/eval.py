"""`unmask eval`: measure checkpoints on tasks, side by side."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from unmask.config.flags import add_device_flags, add_sampling_flags, command, flag, sampler_from
from unmask.errors import ConfigError
from unmask.evaluation.tasks import TASKS, split_names

_HELP = """\
Tasks on --data, a JSONL file in a format of training rows, or with question/answer or problem/answer columns:
{tasks}
Any other name is a task of lm-evaluation-harness (pip install 'unmask[eval]'); lm_eval/NAME forces the harness's.

An --adapter belongs to the --checkpoint before it:  unmask eval --checkpoint BASE --checkpoint BASE --adapter RUN …
"""


def add(commands: Any) -> None:
    """Declare the command."""
    about = "\n".join(f"  {name:<12}{task.about}" for name, task in TASKS.items())
    parser = command(commands, "eval", run, "measure checkpoints on tasks, side by side", _HELP.format(tasks=about))
    flag(parser, "checkpoint", action=_Pair, required=True, metavar="DIR_OR_HUB_ID", help="folder, hub id; repeatable")
    flag(parser, "adapter", action=_Pair, metavar="DIR", help="LoRA adapter of the checkpoint before it")
    flag(parser, "tasks", nargs="+", required=True, metavar="NAME", help="tasks, separated by spaces or commas")
    flag(parser, "data", metavar="FILE.jsonl", help="questions and answers for the tasks below")
    flag(parser, "prompt_column", metavar="NAME", help="column of the questions, if rows are not chats")
    flag(parser, "completion_column", metavar="NAME", help="column of the answers")
    flag(parser, "ignore_keys", nargs="+", default=(), metavar="KEY", help="keys of rows and turns that are left out")
    flag(parser, "limit", type=int, metavar="N", help="the first N rows of each task; each N is another evaluation")
    flag(parser, "few_shot", type=int, metavar="N", help="worked examples before each question (0)")
    flag(parser, "shots_file", metavar="FILE.jsonl", help="the first rows of this file are the worked examples")
    flag(parser, "raw", action="store_true", help="ask in literal text, without a chat template (base models)")
    flag(parser, "output", default="evaluation", metavar="DIR", help="answers and results (default: %(default)s)")
    flag(parser, "against", metavar="DIR", help="--output of an earlier evaluation; count the answers that differ")
    flag(parser, "seed", type=int, default=42, metavar="N", help="seed of draws and masks (default: %(default)s)")
    flag(parser, "batch_size", type=int, metavar="N", help="rows of a network call (default: 16)")
    add_device_flags(parser, "rows")
    likelihood = parser.add_argument_group("likelihoods")
    flag(likelihood, "num_samples", type=int, metavar="N", help="masks an answer (128), or noise levels a canvas (32)")
    flag(likelihood, "antithetic", action="store_true", help="draw masks in complementary pairs")
    harness = parser.add_argument_group("lm-evaluation-harness")
    flag(harness, "include_path", metavar="DIR", help="folder with further task files")
    flag(harness, "apply_chat_template", action="store_true", help="render its prompts with the chat template")
    add_sampling_flags(parser)


class _Pair(argparse.Action):
    """Collects (checkpoint, adapter) pairs."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        pairs = namespace.checkpoint or []
        if self.dest == "checkpoint":
            namespace.checkpoint = [*pairs, (values, None)]
            return
        if not pairs or pairs[-1][1] is not None:
            raise ConfigError(f"--adapter: {values} belongs to no checkpoint; give it right after its --checkpoint")
        namespace.checkpoint = [*pairs[:-1], (pairs[-1][0], values)]


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.evaluation.job import EvalJob, Likelihoods, plan_evaluation

    given = vars(arguments) | {
        "checkpoints": arguments.checkpoint, "tasks": split_names(arguments.tasks), "sampler": sampler_from(arguments),
        "likelihoods": Likelihoods(arguments.num_samples, arguments.antithetic),
    }  # fmt: skip
    plan = plan_evaluation(EvalJob(**{field.name: given[field.name] for field in fields(EvalJob)}))
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    from unmask.evaluation.run import run_job

    return run_job(plan, arguments.device)
