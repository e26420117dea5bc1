"""`unmask eval`: measure checkpoints on tasks, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config.flags import add_sampling_flags, command, flag, sampler_from
from unmask.errors import ConfigError, DataError
from unmask.evaluation.tasks import HARNESS, TASKS, split_names

if TYPE_CHECKING:
    from unmask.evaluation.contestant import Contestant
    from unmask.evaluation.questions import Question

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
    flag(
        parser,
        "limit",
        type=int,
        metavar="N",
        help="the first N rows of each task; a larger N goes on from the answers of a smaller one",
    )
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
    names = split_names(arguments.tasks)
    own = [name for name in names if name in TASKS]
    foreign = [name for name in names if name not in TASKS]
    sampler = sampler_from(arguments)
    _check_values(arguments)
    if foreign:
        from unmask.evaluation.harness import check_names

        check_names(foreign, arguments.include_path)
    _check_meaning(arguments, own, foreign)
    questions = _questions(arguments, own) if own else {}
    contestants = _contestants(arguments, sampler, own)
    manager = None
    if foreign:  # the last check, since the harness reads thousands of files for it
        from unmask.evaluation.harness import task_manager, without_prefix

        manager = task_manager([without_prefix(name) for name in foreign], arguments.include_path)
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    from unmask.distributed.ranks import join
    from unmask.distributed.runtime import own_device, pick_device
    from unmask.evaluation.measure import Likelihoods
    from unmask.evaluation.results import RESULTS
    from unmask.evaluation.side_by_side import Evaluation, evaluate
    from unmask.evaluation.table import outcome_table, output_console

    device = own_device(pick_device(arguments.device))
    ranks = join(device)
    console = output_console(quiet=not ranks.first)
    against = None if arguments.against is None else Path(arguments.against).expanduser()
    evaluation = Evaluation(
        names, questions, arguments.raw, sampler, arguments.seed, arguments.batch_size, arguments.dtype,
        arguments.shard, Likelihoods(arguments.num_samples, arguments.antithetic), arguments.limit, arguments.few_shot,
        arguments.apply_chat_template, manager, Path(arguments.output).expanduser(), against,
    )  # fmt: skip
    outcomes = evaluate(contestants, evaluation, device, ranks, console)
    if ranks.first:
        console.print(outcome_table([each.label for each in contestants], outcomes))
        console.print(f"answers and {RESULTS}: {evaluation.output}", highlight=False, soft_wrap=True)
    return 0


def _check_values(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range and places that are not there."""
    for name in ("limit", "batch_size", "num_samples", "nproc_per_node"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: must be at least 1, got {value}")
    if arguments.few_shot is not None and arguments.few_shot < 0:
        raise ConfigError(f"--few_shot: must be at least 0, got {arguments.few_shot}")
    if arguments.antithetic and arguments.num_samples is not None and arguments.num_samples % 2:
        raise ConfigError(f"--num_samples: must be even with --antithetic, got {arguments.num_samples}")
    if (arguments.prompt_column is None) != (arguments.completion_column is None):
        missing = "prompt_column" if arguments.prompt_column is None else "completion_column"
        raise ConfigError(f"--{missing}: give both columns, or neither")
    output = Path(arguments.output).expanduser()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is no folder; name one, or a new one")
    for name in ("against", "include_path"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise ConfigError(f"--{name}: {folder} is no folder; name one")


def _check_meaning(arguments: argparse.Namespace, own: Sequence[str], foreign: Sequence[str]) -> None:
    """Refuse flags that would do nothing with these tasks, and tasks that need others."""
    from unmask.evaluation.grade import check_grader

    def refuse(names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(arguments, name):
                raise ConfigError(f"--{name}: {why}; leave it out")

    if not own and not foreign:
        raise ConfigError(f"--tasks: names no task; give one or several of {', '.join(TASKS)}")
    if own and arguments.data is None:
        hint = f", or name the harness's: {HARNESS}{own[0]}" if own[0] != "likelihood" else ""
        raise ConfigError(f"--data: the task {own[0]} needs a JSONL file of questions and answers; give one{hint}")
    if own and arguments.few_shot and arguments.shots_file is None:
        raise ConfigError(f"--shots_file: {arguments.few_shot} worked examples are to be taken from a file; name one")
    if not arguments.few_shot:
        refuse(["shots_file"], "no worked examples are asked for with --few_shot")
    if not own:
        files = ["data", "prompt_column", "completion_column", "shots_file", "raw", "against"]
        refuse(files, f"is of {', '.join(TASKS)}, and --tasks names none of them")
    if not foreign:
        refuse(["include_path", "apply_chat_template"], "is of lm-evaluation-harness, and --tasks names none of its")
        if "likelihood" not in own:
            refuse(["num_samples", "antithetic"], "is of likelihoods, and --tasks asks for none")
    for name in own:
        grader = TASKS[name].grader
        if grader is not None:
            check_grader(grader)


def _questions(arguments: argparse.Namespace, own: Sequence[str]) -> dict[str, list[Question]]:
    """Read each task's questions, put worked examples before them, and refuse answers that no model could match."""
    from unmask.data.conversation import Columns
    from unmask.evaluation.grade import expected_answer
    from unmask.evaluation.questions import as_text, read_questions, refuse_leaks, with_shots

    columns = None
    if arguments.prompt_column is not None:
        columns = Columns(arguments.prompt_column, arguments.completion_column)
    questions = read_questions(arguments.data, arguments.limit, columns)
    for name in own:
        task = TASKS[name]
        if task.grader is None:
            continue
        for question in questions:
            if expected_answer(question.reference, task.grader) is None:
                raise DataError(
                    f"{question.place}: the answer has no {task.grader} in it, so no model could be right under "
                    f"--tasks {name}; take another task or mend the row"
                )
    shots = []
    if arguments.few_shot:
        shots = read_questions(arguments.shots_file, arguments.few_shot, columns, "--shots_file")
        if len(shots) < arguments.few_shot:
            raise DataError(f"--shots_file: {arguments.shots_file} has {len(shots)} rows, not {arguments.few_shot}")
        refuse_leaks(questions, shots)
    if arguments.raw:
        return {name: as_text(questions, shots, TASKS[name].asks, TASKS[name].answers) for name in own}
    return dict.fromkeys(own, with_shots(questions, shots))


def _contestants(arguments: argparse.Namespace, sampler: Any, own: Sequence[str]) -> list[Contestant]:
    """Find every checkpoint, adapter and tokenizer, and check the sampler's flags against each family."""
    from unmask.evaluation.contestant import Contestant
    from unmask.models.adapter_folder import find_adapter
    from unmask.models.folders import find_folder, read_generation
    from unmask.models.registry import plan_folder
    from unmask.models.tokenizer import tokenizer_folder
    from unmask.sampling.settings import default_settings, resolve

    labels = _labels(arguments.checkpoint)
    found: list[Contestant] = []
    for label, (name, adapter) in zip(labels, arguments.checkpoint, strict=True):
        folder = str(find_folder(name, "--checkpoint"))
        where = None if adapter is None else str(find_adapter(adapter))
        plan = plan_folder(folder, "--checkpoint")
        resolve(sampler, default_settings(plan.config, read_generation(Path(folder))))
        found.append(Contestant(label, folder, where, str(tokenizer_folder(folder, where))))
    return found


def _labels(pairs: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return a short name for each checkpoint and adapter, no two the same: with one more folder, or else numbered."""
    labels: list[str] = []
    for folders in (1, 2):
        labels = ["+".join(_label(name, folders) for name in pair if name is not None) for pair in pairs]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}-{labels[:place].count(label) + 1}" for place, label in enumerate(labels)]


def _label(name: str, folders: int) -> str:
    """Return the last parts of a folder or hub id; a step's own number counts as none of them."""
    parts = [part for part in Path(name).expanduser().absolute().parts if part not in ("/", "latest")]
    steps = sum(part.startswith("step_") for part in parts[-1:])
    return "-".join(parts[-folders - steps :])
