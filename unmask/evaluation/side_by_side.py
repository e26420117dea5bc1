"""Several checkpoints, several tasks: each pair measured and saved, and all of them side by side in the end."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from unmask.distributed.ranks import ALONE, Ranks, from_first
from unmask.errors import ConfigError
from unmask.evaluation.contestant import Contestant
from unmask.evaluation.exact_match import Asking, encode_questions
from unmask.evaluation.harness import metrics, run_harness, without_prefix
from unmask.evaluation.measure import (
    Likelihoods,
    answers_identity,
    as_plain,
    measure_answers,
    measure_likelihood,
    sum_answers,
    sum_likelihoods,
)
from unmask.evaluation.questions import Question
from unmask.evaluation.records import GROWN_FROM, compare, read_records
from unmask.evaluation.results import (
    RESULTS,
    Outcome,
    Results,
    check_limits,
    check_models,
    read_results,
    write_results,
)
from unmask.evaluation.tasks import HARNESS, TASKS
from unmask.report.resumable import first_difference, write_lines

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from unmask.config.sampler import SamplerConfig


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how; the same for every contestant.

    Attributes:
        tasks: names; keys of TASKS, others are the harness's.
        questions: of each of our own tasks, by its name.
        raw: whether those are literal text.
        sampler: settings that were given.
        seed: of draws and masks.
        batch_size: rows that the network sees at once; None = 16.
        dtype: of the weights; None = as stored.
        shard: ranks share each model.
        likelihoods: how likelihoods are estimated.
        limit, few_shot, chat: of the harness's tasks.
        manager: the harness's task manager; None without its tasks.
        output: folder of the files.
        against: folder of an earlier evaluation whose answers are compared; None for none.
    """

    tasks: Sequence[str]
    questions: Mapping[str, Sequence[Question]]
    raw: bool
    sampler: SamplerConfig
    seed: int
    batch_size: int | None
    dtype: str | None
    shard: bool
    likelihoods: Likelihoods
    limit: int | None
    few_shot: int | None
    chat: bool
    manager: Any
    output: Path
    against: Path | None


def evaluate(
    contestants: Sequence[Contestant], evaluation: Evaluation, device: torch.device, ranks: Ranks, console: Console
) -> list[Outcome]:
    """Measure every task for every model, one model in memory at a time; write and return the outcomes. A collective.

    Returns:
        on the first rank all outcomes, by model and task; on the others nothing of use.

    Raises:
        ConfigError: a file in the output folder, or one to compare with, is of another evaluation.
    """
    earlier = from_first(ranks, lambda: _check_folders(contestants, evaluation))
    outcomes: list[Outcome] = []
    for contestant in contestants:
        outcomes += _evaluate_one(contestant, evaluation, device, ranks, console)
        gc.collect()
    if ranks.first:
        for outcome in outcomes:
            outcome.add_earlier(earlier.entries.get((outcome.task, outcome.label), {}))
        _compare(outcomes, evaluation)
    from_first(ranks, lambda: write_results(contestants, outcomes, earlier, evaluation.output / RESULTS))
    return outcomes


def answers_file(output: Path, task: str, label: str) -> Path:
    """Return the file of one task of one model; the harness's tasks are named with our prefix."""
    return output / f"{task.replace('/', '-')}-{label}.jsonl"


def _check_folders(contestants: Sequence[Contestant], evaluation: Evaluation) -> Results:
    """Return the results that are there, and refuse before any model loads what could not be added or compared."""
    from unmask.models.folders import read_generation
    from unmask.models.registry import plan_folder
    from unmask.models.tokenizer import load_tokenizer

    earlier = read_results(evaluation.output)
    check_models(contestants, earlier, evaluation.output)
    foreign = [HARNESS + without_prefix(name) for name in evaluation.tasks if name not in TASKS]
    labels = [contestant.label for contestant in contestants]
    check_limits(foreign, labels, evaluation.limit, earlier, evaluation.output)
    names = [name for name in evaluation.tasks if name in TASKS and TASKS[name].kind == "answers"]
    if evaluation.against is None:
        return earlier
    for contestant in contestants:
        tokenizer = load_tokenizer(contestant.tokenizer, "--checkpoint")
        config = plan_folder(contestant.checkpoint, "--checkpoint").config
        unloaded = SimpleNamespace(config=config, generation=read_generation(Path(contestant.checkpoint)))
        for name in names:
            path = answers_file(evaluation.against, name, contestant.label)
            if not path.is_file():
                raise ConfigError(f"--against: {path} is not there; compare with an evaluation of the same command")
            asked = encode_questions(unloaded, evaluation.questions[name], tokenizer)  # pyright: ignore[reportArgumentType]
            asking = _asking(name, evaluation, unloaded, tokenizer, asked)
            wanted = answers_identity(asking, _identity(name, contestant, evaluation))
            different = first_difference(read_records(path)[0], wanted, ("dtype", GROWN_FROM))
            if different is not None:
                raise ConfigError(
                    f"--against: {path} is of another evaluation ({different}); only the batch size, the number of "
                    "processes and the dtype may differ"
                )
    return earlier


def _identity(name: str, contestant: Contestant, evaluation: Evaluation) -> dict[str, Any]:
    return {"task": name, **contestant.fingerprint(), "dtype": evaluation.dtype or "as stored"}


def _evaluate_one(
    contestant: Contestant, evaluation: Evaluation, device: torch.device, ranks: Ranks, console: Console
) -> list[Outcome]:
    from unmask.distributed.answering import load_for_answers
    from unmask.models.adapter_base import base_note
    from unmask.models.tokenizer import load_tokenizer
    from unmask.sampling.backends.backend import settings_for
    from unmask.sampling.family_settings import approximation_note

    tokenizer = load_tokenizer(contestant.tokenizer, "--checkpoint")
    model, together = load_for_answers(
        contestant.checkpoint, evaluation.dtype, device, contestant.adapter, ranks, evaluation.shard
    )
    note = approximation_note(settings_for(model, evaluation.sampler))
    if note and (evaluation.manager is not None or any(TASKS[name].kind == "answers" for name in evaluation.questions)):
        console.print(f"{contestant.label}: {note}", highlight=False, soft_wrap=True)
    if contestant.adapter is not None:
        other_base = base_note(Path(contestant.adapter), Path(contestant.checkpoint))
        if other_base:
            console.print(f"warning: {contestant.label}: {other_base}", highlight=False, soft_wrap=True)
    encoded: dict[int, list[tuple[int, ...]]] = {}  # by list: the tasks share one unless they write literal text
    outcomes = []
    for name in evaluation.tasks:
        if name in TASKS:
            questions = evaluation.questions[name]
            if id(questions) not in encoded:
                encoded[id(questions)] = encode_questions(model, questions, tokenizer)
            asking = _asking(name, evaluation, model, tokenizer, encoded[id(questions)], ranks, together)
            outcomes.append(_own_task(name, contestant, evaluation, asking, console))
    if evaluation.manager is not None:
        outcomes += _harness_tasks(contestant, evaluation, model, tokenizer, ranks, together, console)
    return outcomes


def _asking(
    name: str,
    evaluation: Evaluation,
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[int, ...]],
    ranks: Ranks = ALONE,
    together: AbstractContextManager[Any] | None = None,
) -> Asking:
    task = TASKS[name]
    return Asking(
        model,
        evaluation.questions[name],
        asked,
        tokenizer,
        evaluation.sampler,
        evaluation.seed,
        evaluation.batch_size,
        task.grader or "text",
        task.stops if evaluation.raw else (),
        ranks,
        together or nullcontext(),
    )


def _own_task(name: str, contestant: Contestant, evaluation: Evaluation, asking: Asking, console: Console) -> Outcome:
    from unmask.sampling.backends.backend import settings_for
    from unmask.sampling.generate import DEFAULT_BATCH_SIZE

    path = answers_file(evaluation.output, name, contestant.label)
    identity = _identity(name, contestant, evaluation)
    began, answered = time.perf_counter(), 0

    def progress(done: int, total: int, new: int) -> None:
        nonlocal answered
        answered += new
        left = (time.perf_counter() - began) / answered * (total - done)
        rest = f", about {_duration(left)} left" if done < total else ""
        console.print(f"{name}, {contestant.label}: {done} of {total}{rest}", highlight=False)

    kind = TASKS[name].kind
    size: int | list[int] = evaluation.batch_size or DEFAULT_BATCH_SIZE
    if kind == "likelihood":
        records = measure_likelihood(asking, path, identity, evaluation.likelihoods, progress)
    else:
        records = measure_answers(asking, path, identity, progress)
    if not asking.ranks.first:
        return Outcome(name, contestant.label, kind, {}, {}, path.name, size)
    if not answered:
        said = f"{name}, {contestant.label}: all {len(records)} were there already; nothing was computed"
        console.print(said, highlight=False)
    if kind == "answers":
        sizes = sorted({record["batch_size"] for record in records})
        size = sizes[0] if len(sizes) == 1 else sizes
    result = sum_likelihoods(records) if kind == "likelihood" else sum_answers(records)
    not_set = ("task", "weights", "adapter", GROWN_FROM)
    settings = {key: value for key, value in read_records(path)[0].items() if key not in not_set}
    if kind == "answers":
        settings["approximations"] = list(settings_for(asking.model, asking.sampler).approximations)
    seconds = time.perf_counter() - began if answered else None
    return Outcome(name, contestant.label, kind, result, settings, path.name, size, records, seconds, answered)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _harness_tasks(
    contestant: Contestant,
    evaluation: Evaluation,
    model: Any,
    tokenizer: Any,
    ranks: Ranks,
    together: AbstractContextManager[Any],
    console: Console,
) -> list[Outcome]:
    from unmask.evaluation.lm_eval import UnmaskLM
    from unmask.sampling.generate import DEFAULT_BATCH_SIZE

    began = time.perf_counter()
    options = {} if evaluation.likelihoods.num_samples is None else {"num_samples": evaluation.likelihoods.num_samples}
    lm = UnmaskLM(
        model,
        tokenizer=tokenizer,
        batch_size=evaluation.batch_size,
        seed=evaluation.seed,
        antithetic=evaluation.likelihoods.antithetic,
        ranks=ranks,
        together=together,
        **options,
        **evaluation.sampler.given,
    )
    lm.name = contestant.label
    # The harness's cache is keyed by requests alone, so its file's name says what answered them. Ranks must make the
    # same calls, and their caches could differ after an interruption.
    identity = {**contestant.fingerprint(), "dtype": evaluation.dtype, "seed": evaluation.seed, **options,
                "antithetic": evaluation.likelihoods.antithetic, "sampler": evaluation.sampler.given}  # fmt: skip
    key = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    cache = str(evaluation.output / f"lm_eval-{contestant.label}-{key}") if ranks.size == 1 else None
    found = run_harness(
        lm,
        evaluation.manager,
        [without_prefix(name) for name in evaluation.tasks if name not in TASKS],
        limit=evaluation.limit,
        few_shot=evaluation.few_shot,
        chat=evaluation.chat,
        seed=evaluation.seed,
        cache=cache,
    )
    from_first(ranks, lambda: _write_samples(contestant, evaluation, found["samples"]))
    seconds = time.perf_counter() - began
    results = found["results"]
    if results:
        said = f"lm-evaluation-harness, {contestant.label}: {len(results)} results in {_duration(seconds)}"
        console.print(said, highlight=False)
    settings = {
        **_harness_settings(evaluation, model),
        "num_samples": lm.num_samples,
        "antithetic": lm.antithetic,
    }
    outcomes = []
    for task, result in results.items():
        values = {metric: {"value": value, "standard_error": error} for metric, value, error in metrics(result)}
        file = answers_file(evaluation.output, HARNESS + task, contestant.label).name
        outcomes.append(
            Outcome(
                HARNESS + task,
                contestant.label,
                "harness",
                values,
                settings,
                file if task in found["samples"] else None,
                evaluation.batch_size or DEFAULT_BATCH_SIZE,
                # The harness answers all of its tasks together.
                seconds=seconds if len(results) == 1 else None,
            )
        )
    return outcomes


def _harness_settings(evaluation: Evaluation, model: Any) -> dict[str, Any]:
    from unmask.sampling.backends.backend import settings_for

    settings = settings_for(model, evaluation.sampler)
    return {
        "dtype": evaluation.dtype or "as stored",
        "seed": evaluation.seed,
        # A task may set the answer's length and the temperature, where these were not given.
        "sampler": as_plain(dataclasses.asdict(settings)),
        "approximations": list(settings.approximations),
        "few_shot": evaluation.few_shot,
        "limit": evaluation.limit,
        "chat": evaluation.chat,
    }


def _write_samples(contestant: Contestant, evaluation: Evaluation, samples: Mapping[str, Any]) -> None:
    for task, each in samples.items():
        path = answers_file(evaluation.output, HARNESS + task, contestant.label)
        write_lines(path, [json.dumps(sample, default=str, ensure_ascii=False) for sample in each])


def _compare(outcomes: Sequence[Outcome], evaluation: Evaluation) -> None:
    """Fill in how each model's answers differ from the first model's and from those of an earlier evaluation."""
    firsts: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.kind != "answers":
            continue
        first = firsts.setdefault(outcome.task, outcome)
        if first is not outcome:
            outcome.compared["first"] = vars(compare(first.records, outcome.records))
        if evaluation.against is not None:
            old = read_records(answers_file(evaluation.against, outcome.task, outcome.label))[1]
            outcome.compared["against"] = vars(compare(old, outcome.records))
