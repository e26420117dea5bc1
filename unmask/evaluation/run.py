"""Runs an evaluation job: every task for each checkpoint, one model in memory at a time, all results in one table."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unmask.distributed.ranks import Ranks, from_first, join
from unmask.distributed.runtime import own_device, pick_device
from unmask.errors import ConfigError
from unmask.evaluation.exact_match import TaskRun, encode_questions
from unmask.evaluation.harness import metrics, run_harness, unscored
from unmask.evaluation.job import Checkpoint, EvalJob, EvalPlan
from unmask.evaluation.measure import (
    answers_identity,
    as_plain,
    measure_answers,
    measure_likelihood,
    read_records,
    sum_answers,
    sum_likelihoods,
)
from unmask.evaluation.results import (
    RESULTS,
    Outcome,
    Results,
    compare,
    outcome_table,
    output_console,
    read_results,
    write_results,
)
from unmask.evaluation.tasks import HARNESS, TASKS, unread_keys
from unmask.places import LOCK, hold
from unmask.report.resumable import first_difference, write_lines
from unmask.sampling.generate import DEFAULT_BATCH_SIZE
from unmask.sampling.jobs import LoadedModel, load


def run_job(plan: EvalPlan, device_name: str) -> None:
    """Run a job on this process's device and ranks, and print its table."""
    device = own_device(pick_device(device_name))
    ranks = join(device, plan.job.timeout_minutes)
    console = output_console(quiet=not ranks.first)
    for line in unread_keys(next(iter(plan.questions.values()), ())):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    outcomes = evaluate(plan, device, ranks, console)
    if ranks.first:
        console.print(outcome_table([checkpoint.label for checkpoint in plan.checkpoints], outcomes))
        console.print(f"answers and {RESULTS}: {plan.output}", highlight=False, soft_wrap=True)


def evaluate(plan: EvalPlan, device: torch.device, ranks: Ranks, console: Console) -> list[Outcome]:
    """Measure every task for every checkpoint; write and return the outcomes. A collective.

    Returns:
        on the first rank all outcomes, ordered by checkpoint and task; meaningless on the others.

    Raises:
        ConfigError: a file in the output folder, or in `against`, is of another evaluation.
        CheckpointError: another process works in the output folder.
    """
    with contextlib.ExitStack() as stack:
        from_first(ranks, lambda: stack.enter_context(hold(plan.output / LOCK, "--output", plan.output, "works in")))
        return _evaluate_all(plan, device, ranks, console)


def _evaluate_all(plan: EvalPlan, device: torch.device, ranks: Ranks, console: Console) -> list[Outcome]:
    earlier = from_first(ranks, lambda: _check_folders(plan))
    outcomes: list[Outcome] = []
    for checkpoint in plan.checkpoints:
        outcomes += _evaluate_one(checkpoint, plan, device, ranks, console)
        gc.collect()
    if ranks.first:
        for outcome in outcomes:
            outcome.add_earlier(earlier.entries.get((outcome.task, outcome.label), {}))
        _compare(outcomes, plan)
    from_first(ranks, lambda: write_results(plan, outcomes, earlier))
    return outcomes


def answers_file(output: Path, task: str, label: str) -> Path:
    """Return the file of a task's answers; a harness task's name includes its prefix."""
    return output / f"{task.replace('/', '-')}-{label}.jsonl"


def _check_folders(plan: EvalPlan) -> Results:
    """Return results already in the output folder; before any model loads, refuse what cannot be added or compared."""
    job, earlier = plan.job, read_results(plan)
    if plan.against is None:
        return earlier
    for checkpoint in plan.checkpoints:
        for name in job.our_tasks:
            if TASKS[name].kind != "answers":
                continue
            path = answers_file(plan.against, name, checkpoint.label)
            if not path.is_file():
                raise ConfigError(f"--against: {path} is not there; compare with an evaluation of the same command")
            questions, model = plan.questions[name], checkpoint.plan
            prompts = encode_questions(questions, model.tokenizer, model.config)
            identity = answers_identity(
                _identity(name, checkpoint, job), model.settings, questions, prompts, job.seed, *_grading(name, job)
            )
            different = first_difference(read_records(path)[0], identity, ("dtype",))
            if different is not None:
                raise ConfigError(
                    f"--against: {path} is of another evaluation ({different}); only the batch size, the number of "
                    "processes and the dtype may differ"
                )
    return earlier


def _identity(name: str, checkpoint: Checkpoint, job: EvalJob) -> dict[str, Any]:
    return {"task": name, **checkpoint.plan.fingerprint(), "dtype": job.dtype or "as stored"}


def _grading(name: str, job: EvalJob) -> tuple[str, tuple[str, ...]]:
    """Return a task's grader and stop strings."""
    return TASKS[name].grader or "text", TASKS[name].stops if job.raw else ()


def _evaluate_one(
    checkpoint: Checkpoint, plan: EvalPlan, device: torch.device, ranks: Ranks, console: Console
) -> list[Outcome]:
    job = plan.job
    loaded = load(checkpoint.plan, device, job.dtype, ranks, job.shard)
    note = loaded.settings.note
    if note and (plan.manager is not None or any(TASKS[name].kind == "answers" for name in plan.questions)):
        console.print(f"{checkpoint.label}: {note}", highlight=False, soft_wrap=True)
    idle = [] if loaded.idle is None else [f"{loaded.idle}; give --dtype bfloat16"]
    for line in (*checkpoint.plan.notes(), *idle):
        console.print(f"warning: {checkpoint.label}: {line}", highlight=False, soft_wrap=True)
    encoded: dict[int, list[tuple[int, ...]]] = {}  # by id of the questions, which tasks may share
    outcomes = []
    for name in job.our_tasks:
        questions = plan.questions[name]
        if id(questions) not in encoded:
            encoded[id(questions)] = encode_questions(questions, checkpoint.plan.tokenizer, loaded.config)
        prompts = encoded[id(questions)]
        run = TaskRun(loaded, questions, prompts, job.seed, job.batch_size, *_grading(name, job))
        outcomes.append(_our_task(name, checkpoint, plan, run, console))
    if plan.manager is not None:
        outcomes += _harness_tasks(plan, checkpoint, loaded, console)
    return outcomes


def _our_task(name: str, checkpoint: Checkpoint, plan: EvalPlan, run: TaskRun, console: Console) -> Outcome:
    path = answers_file(plan.output, name, checkpoint.label)
    identity = _identity(name, checkpoint, plan.job)
    began, computed = time.perf_counter(), 0

    def progress(done: int, total: int, new: int) -> None:
        nonlocal computed
        computed += new
        left = (time.perf_counter() - began) / computed * (total - done)
        rest = f", about {_duration(left)} left" if done < total else ""
        console.print(f"{name}, {checkpoint.label}: {done} of {total}{rest}", highlight=False)

    kind = TASKS[name].kind
    if kind == "likelihood":
        records = measure_likelihood(run, path, identity, plan.job.likelihoods, progress)
    else:
        records = measure_answers(run, path, identity, progress)
    size: int | list[int] = plan.job.batch_size or DEFAULT_BATCH_SIZE
    if not run.loaded.ranks.first:
        return Outcome(name, checkpoint.label, kind, {}, {}, path.name, size)
    if not computed:
        note = f"{name}, {checkpoint.label}: all {len(records)} were there already; nothing was computed"
        console.print(note, highlight=False)
    settings = {key: value for key, value in read_records(path)[0].items() if key not in ("task", "weights", "adapter")}
    if kind == "answers":
        sizes = sorted({record["batch_size"] for record in records})
        size = sizes[0] if len(sizes) == 1 else sizes
        settings["approximations"] = list(run.loaded.settings.approximations)
    result = sum_likelihoods(records) if kind == "likelihood" else sum_answers(records)
    seconds = time.perf_counter() - began if computed else None
    return Outcome(name, checkpoint.label, kind, result, settings, path.name, size, records, seconds, computed)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _harness_tasks(plan: EvalPlan, checkpoint: Checkpoint, loaded: LoadedModel, console: Console) -> list[Outcome]:
    from unmask.evaluation.lm_eval import UnmaskLM  # imports the harness

    job, label, ranks = plan.job, checkpoint.label, loaded.ranks
    began = time.perf_counter()
    options = {} if job.likelihoods.num_samples is None else {"num_samples": job.likelihoods.num_samples}
    lm = UnmaskLM(
        loaded,
        batch_size=job.batch_size,
        seed=job.seed,
        antithetic=job.likelihoods.antithetic,
        **options,
        **job.sampler.given,
    )
    lm.name = label
    # The harness keys its cache by requests alone, so the file's name must identify the model. Only on one rank: caches
    # could differ after an interruption, and ranks must make the same calls.
    identity = {**checkpoint.plan.fingerprint(), "dtype": job.dtype, "seed": job.seed, **options,
                "antithetic": job.likelihoods.antithetic, "sampler": job.sampler.given}  # fmt: skip
    key = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    answered = run_harness(
        lm,
        plan.manager,
        job.harness_tasks,
        limit=job.limit,
        few_shot=job.few_shot,
        chat=job.apply_chat_template,
        seed=job.seed,
        cache=str(plan.output / f"lm_eval-{label}-{key}") if ranks.size == 1 else None,
    )
    from_first(ranks, lambda: _write_samples(plan, label, answered["samples"]))
    seconds = time.perf_counter() - began
    results = answered["results"]
    if results:
        note = f"lm-evaluation-harness, {label}: {len(results)} results in {_duration(seconds)}"
        console.print(note, highlight=False)
    lost = {task: unscored(each) for task, each in answered["samples"].items()}
    for task, count in lost.items():
        if count:
            note = f"warning: {HARNESS}{task}, {label}: requests that could not be scored, of likelihood 0: {count}"
            console.print(note, highlight=False, soft_wrap=True)
    settings = {
        "dtype": job.dtype or "as stored",
        "seed": job.seed,
        # A task may set the answer's length and the temperature, where these were not given.
        "sampler": as_plain(loaded.settings.values),
        "approximations": list(loaded.settings.approximations),
        "few_shot": job.few_shot,
        "limit": job.limit,
        "chat": job.apply_chat_template,
        "num_samples": lm.arguments.num_samples,
        "antithetic": lm.arguments.antithetic,
    }
    return [
        Outcome(
            HARNESS + task,
            label,
            "harness",
            {metric: {"value": value, "standard_error": error} for metric, value, error in metrics(result)},
            settings | ({"unscored": lost[task]} if task in lost else {}),
            answers_file(plan.output, HARNESS + task, label).name if task in answered["samples"] else None,
            job.batch_size or DEFAULT_BATCH_SIZE,
            # The harness answers all of its tasks together.
            seconds=seconds if len(results) == 1 else None,
        )
        for task, result in results.items()
    ]


def _write_samples(plan: EvalPlan, label: str, samples: Mapping[str, Any]) -> None:
    for task, each in samples.items():
        path = answers_file(plan.output, HARNESS + task, label)
        write_lines(path, [json.dumps(sample, default=str, ensure_ascii=False) for sample in each])


def _compare(outcomes: Sequence[Outcome], plan: EvalPlan) -> None:
    """Compare each checkpoint's answers with the first checkpoint's and with the earlier evaluation's; fill it in."""
    firsts: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.kind != "answers":
            continue
        first = firsts.setdefault(outcome.task, outcome)
        if first is not outcome:
            outcome.compared["first"] = vars(compare(first.records, outcome.records))
        if plan.against is not None:
            old = read_records(answers_file(plan.against, outcome.task, outcome.label))[1]
            outcome.compared["against"] = vars(compare(old, outcome.records))
