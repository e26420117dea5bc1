"""What `unmask eval` is asked to do, checked before anything heavy loads. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.config.sampler import SamplerConfig
from unmask.data.formats import Columns
from unmask.errors import ConfigError, DataError
from unmask.evaluation.grade import check_grader, expected_answer
from unmask.evaluation.harness import check_names, task_manager
from unmask.evaluation.tasks import HARNESS, TASKS, Question, as_text, read_questions, refuse_leaks, with_shots
from unmask.places import user_path
from unmask.sampling.plan import JobPlan, plan_job


@dataclass(frozen=True)
class Checkpoint:
    """One model to be evaluated: where it is, and a short name for tables and files, unique in a job."""

    label: str
    plan: JobPlan


@dataclass(frozen=True)
class Likelihoods:
    """How likelihoods are estimated; `num_samples` None = the estimator's default."""

    num_samples: int | None = None
    antithetic: bool = False


@dataclass(frozen=True)
class EvalJob:
    """Checkpoints, each with an adapter or None, to be measured on tasks; the fields are `unmask eval`'s flags.

    Raises:
        ConfigError: a value out of range, a folder that is not there, or a field that means nothing for these tasks.
        MissingDependencyError: a grader's package, or the harness, is not installed.
    """

    checkpoints: Sequence[tuple[str, str | None]]
    tasks: Sequence[str]
    sampler: SamplerConfig
    data: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    ignore_keys: Sequence[str] = ()
    limit: int | None = None
    few_shot: int | None = None
    shots_file: str | None = None
    raw: bool = False
    output: str = "evaluation"
    against: str | None = None
    seed: int = 42
    batch_size: int | None = None
    dtype: str | None = None
    shard: bool = False
    timeout_minutes: float = 30.0
    likelihoods: Likelihoods = Likelihoods()
    include_path: str | None = None
    apply_chat_template: bool = False
    no_verify: bool = False

    def __post_init__(self) -> None:
        self._check_values()
        if self.harness_tasks:
            check_names(self.harness_tasks, self.include_path)
        self._check_meaning()

    @cached_property
    def our_tasks(self) -> list[str]:
        """Those of the tasks that are keys of TASKS."""
        return [name for name in self.tasks if name in TASKS]

    @cached_property
    def harness_tasks(self) -> list[str]:
        """The others, as they were named."""
        return [name for name in self.tasks if name not in TASKS]

    def _check_values(self) -> None:
        """Refuse numbers out of range and folders that are not there."""
        numbers = {"limit": self.limit, "batch_size": self.batch_size, "num_samples": self.likelihoods.num_samples}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: must be at least 1, got {value}")
        if self.few_shot is not None and self.few_shot < 0:
            raise ConfigError(f"--few_shot: must be at least 0, got {self.few_shot}")
        samples = self.likelihoods.num_samples
        if self.likelihoods.antithetic and samples is not None and samples % 2:
            raise ConfigError(f"--num_samples: must be even with --antithetic, got {samples}")
        if (self.prompt_column is None) != (self.completion_column is None):
            missing = "prompt_column" if self.prompt_column is None else "completion_column"
            raise ConfigError(f"--{missing}: give both columns, or neither")
        output = user_path(self.output, "--output")
        if output.exists() and not output.is_dir():
            raise ConfigError(f"--output: {output} is no folder; name one, or a new one")
        for name, folder in {"against": self.against, "include_path": self.include_path}.items():
            if folder is not None and not user_path(folder, f"--{name}").is_dir():
                raise ConfigError(f"--{name}: {folder} is no folder; name one")

    def _check_meaning(self) -> None:
        """Refuse fields that would do nothing with these tasks, and tasks that need others."""
        ours, theirs = self.our_tasks, self.harness_tasks

        def refuse(why: str, **values: Any) -> None:
            for name, value in values.items():
                if value:
                    raise ConfigError(f"--{name}: {why}; leave it out")

        if not self.tasks:
            raise ConfigError(f"--tasks: names no task; give one or several of {', '.join(TASKS)}")
        if ours and self.data is None:
            hint = f", or name the harness's: {HARNESS}{ours[0]}" if ours[0] != "likelihood" else ""
            raise ConfigError(f"--data: the task {ours[0]} needs a JSONL file of questions and answers; give one{hint}")
        if ours and self.few_shot and self.shots_file is None:
            raise ConfigError(f"--shots_file: {self.few_shot} worked examples are to be taken from a file; name one")
        if not self.few_shot:
            refuse("no worked examples are asked for with --few_shot", shots_file=self.shots_file)
        if not ours:
            refuse(
                f"is of {', '.join(TASKS)}, and --tasks names none of them",
                data=self.data, prompt_column=self.prompt_column, completion_column=self.completion_column,
                ignore_keys=self.ignore_keys, shots_file=self.shots_file, raw=self.raw, against=self.against,
            )  # fmt: skip
        if not theirs:
            refuse(
                "is of lm-evaluation-harness, and --tasks names none of its",
                include_path=self.include_path, apply_chat_template=self.apply_chat_template,
            )  # fmt: skip
            if "likelihood" not in ours:
                refuse("is of likelihoods, and --tasks asks for none", **vars(self.likelihoods))
        for name in ours:
            grader = TASKS[name].grader
            if grader is not None:
                check_grader(grader)


@dataclass(frozen=True)
class EvalPlan:
    """A job with all that it names found and read; `manager` is the harness's, None without its tasks."""

    job: EvalJob
    checkpoints: Sequence[Checkpoint]
    questions: Mapping[str, Sequence[Question]]
    manager: Any
    output: Path
    against: Path | None


def plan_evaluation(job: EvalJob) -> EvalPlan:
    """Read the questions, find the checkpoints and the harness's tasks, and check settings against each family.

    Raises:
        UnmaskError: questions that cannot be read, asked or graded; no checkpoint, adapter or tokenizer; settings that
            a checkpoint's family does not have; an unknown task.
    """
    questions = _questions(job) if job.our_tasks else {}
    checkpoints = [
        Checkpoint(label, plan_job(name, job.sampler, adapter, verify=not job.no_verify))
        for label, (name, adapter) in zip(_labels(job.checkpoints), job.checkpoints, strict=True)
    ]
    manager = None
    if job.harness_tasks:  # the last check, since the harness reads thousands of files for it
        manager = task_manager(job.harness_tasks, job.include_path)
    against = None if job.against is None else user_path(job.against, "--against")
    return EvalPlan(job, checkpoints, questions, manager, user_path(job.output, "--output"), against)


def _questions(job: EvalJob) -> dict[str, list[Question]]:
    """Read each task's questions, put worked examples before them, and refuse answers that no model could match."""
    assert job.data is not None
    columns = Columns(job.prompt_column, job.completion_column, job.ignore_keys)
    questions = read_questions(job.data, job.limit, columns)
    for name in job.our_tasks:
        grader = TASKS[name].grader
        if grader is None:
            continue
        for question in questions:
            if expected_answer(question.reference, grader) is None:
                raise DataError(
                    f"{question.label}: the answer has no {grader} in it, so no model could be right under --tasks "
                    f"{name}; take another task or mend the row"
                )
    shots = []
    if job.few_shot and job.shots_file is not None:
        shots = read_questions(job.shots_file, job.few_shot, columns, "--shots_file")
        if len(shots) < job.few_shot:
            raise DataError(f"--shots_file: {job.shots_file} has {len(shots)} rows, not {job.few_shot}")
        refuse_leaks(questions, shots)
    if job.raw:
        return {name: as_text(questions, shots, TASKS[name].asks, TASKS[name].answers) for name in job.our_tasks}
    return dict.fromkeys(job.our_tasks, with_shots(questions, shots))


def _labels(pairs: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return a unique short name for each checkpoint and adapter: with one more folder, or else numbered."""
    labels: list[str] = []
    for folders in (1, 2):
        labels = ["+".join(_label(name, folders) for name in pair if name is not None) for pair in pairs]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}-{labels[:index].count(label) + 1}" for index, label in enumerate(labels)]


def _label(name: str, folders: int) -> str:
    """Return the last parts of a folder or hub id; a step's own number counts as none of them."""
    parts = [part for part in user_path(name, "--checkpoint").absolute().parts if part not in ("/", "latest")]
    steps = sum(part.startswith("step_") for part in parts[-1:])
    return "-".join(parts[-folders - steps :])
