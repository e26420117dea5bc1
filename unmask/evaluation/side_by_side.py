"""Several checkpoints, several tasks: each pair measured and saved, and all of them side by side in the end."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.distributed.ranks import Ranks, from_first
from unmask.errors import CheckpointError
from unmask.evaluation.contestant import Contestant
from unmask.evaluation.exact_match import Asking, encode_questions
from unmask.evaluation.harness import metrics, run_harness, without_prefix
from unmask.evaluation.measure import (
    Likelihoods,
    measure_answers,
    measure_likelihood,
    sum_answers,
    sum_likelihoods,
)
from unmask.evaluation.questions import Question
from unmask.evaluation.records import Record, append_records, compare, read_records
from unmask.evaluation.tasks import TASKS

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from unmask.sampling.settings import SamplerConfig

RESULTS = "results.json"


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how; the same for every contestant.

    Attributes:
        tasks: names; keys of TASKS, others are the harness's.
        questions: of our own tasks.
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
    questions: Sequence[Question]
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


@dataclass
class Outcome:
    """One task of one model.

    Attributes:
        task: its name.
        label: the model's.
        result: its numbers by name; of the harness, metric → value and standard error.
        records: its records; empty for the harness's tasks.
        seconds: that this call spent on it (on all of the harness's together); what was there before costs nothing.
        compared: how the answers differ from others: `first` model's, and those of an earlier evaluation (`against`).
    """

    task: str
    label: str
    result: dict[str, Any]
    records: list[Record]
    seconds: float
    compared: dict[str, Any] = field(default_factory=dict)


def evaluate(
    contestants: Sequence[Contestant], evaluation: Evaluation, device: torch.device, ranks: Ranks, console: Console
) -> list[Outcome]:
    """Measure every task for every model, one model in memory at a time; write and return the outcomes. A collective.

    Returns:
        on the first rank all outcomes, by model and task; on the others nothing of use.

    Raises:
        ConfigError: a file in the output folder is of another evaluation.
    """
    outcomes: list[Outcome] = []
    for contestant in contestants:
        outcomes += _evaluate_one(contestant, evaluation, device, ranks, console)
        gc.collect()
    if ranks.first:
        _compare(outcomes, evaluation)
    from_first(ranks, lambda: write_results(contestants, outcomes, evaluation))
    return outcomes


def answers_file(output: Path, task: str, label: str) -> Path:
    """Return the file of one task of one model."""
    return output / f"{without_prefix(task).replace('/', '-')}-{label}.jsonl"


def _evaluate_one(
    contestant: Contestant, evaluation: Evaluation, device: torch.device, ranks: Ranks, console: Console
) -> list[Outcome]:
    from unmask.distributed.answering import load_for_answers
    from unmask.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(contestant.tokenizer, "--checkpoint")
    model, together = load_for_answers(
        contestant.checkpoint, evaluation.dtype, device, contestant.adapter, ranks, evaluation.shard
    )
    asked: list[tuple[int, ...]] = []
    if evaluation.questions:
        asked = encode_questions(model, evaluation.questions, tokenizer)
    outcomes = []
    for name in evaluation.tasks:
        if name in TASKS:
            began = time.perf_counter()
            result, records = _own_task(name, contestant, evaluation, model, tokenizer, asked, ranks, together, console)
            outcomes.append(Outcome(name, contestant.label, result, records, time.perf_counter() - began))
    if evaluation.manager is not None:
        began = time.perf_counter()
        found = _harness_tasks(contestant, evaluation, model, tokenizer, ranks, together)
        for task, result in found["results"].items():
            values = {metric: {"value": value, "standard_error": error} for metric, value, error in metrics(result)}
            outcomes.append(Outcome(task, contestant.label, values, [], time.perf_counter() - began))
    return outcomes


def _own_task(
    name: str,
    contestant: Contestant,
    evaluation: Evaluation,
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[int, ...]],
    ranks: Ranks,
    together: AbstractContextManager[Any],
    console: Console,
) -> tuple[dict[str, Any], list[Record]]:
    task = TASKS[name]
    asking = Asking(
        model,
        evaluation.questions,
        asked,
        tokenizer,
        evaluation.sampler,
        evaluation.seed,
        evaluation.batch_size,
        task.grader or "text",
        task.stops if evaluation.raw else (),
        ranks,
        together,
    )
    path = answers_file(evaluation.output, name, contestant.label)
    identity = {"task": name, **contestant.fingerprint(), "dtype": evaluation.dtype or "as stored"}

    began, before = time.perf_counter(), [0]

    def progress(done: int, total: int, new: int) -> None:
        before[0] += new
        left = (time.perf_counter() - began) / before[0] * (total - done)
        rest = f", about {_duration(left)} left" if done < total else ""
        console.print(f"{name}, {contestant.label}: {done} of {total}{rest}", highlight=False)

    if task.kind == "likelihood":
        records = measure_likelihood(asking, path, identity, evaluation.likelihoods, progress)
        return (sum_likelihoods(records) if ranks.first else {}), records
    records = measure_answers(asking, path, identity, progress)
    return (sum_answers(records) if ranks.first else {}), records


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _harness_tasks(
    contestant: Contestant,
    evaluation: Evaluation,
    model: Any,
    tokenizer: Any,
    ranks: Ranks,
    together: AbstractContextManager[Any],
) -> dict[str, Any]:
    from unmask.evaluation.lm_eval import UnmaskLM

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
    for task, samples in found["samples"].items():
        path = answers_file(evaluation.output, task, contestant.label)
        path.unlink(missing_ok=True)
        append_records(path, json.loads(json.dumps(samples, default=str)))
    return found


def _compare(outcomes: Sequence[Outcome], evaluation: Evaluation) -> None:
    """Fill in how each model's answers differ from the first model's and from those of an earlier evaluation."""
    firsts: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.task not in TASKS or TASKS[outcome.task].kind != "answers":
            continue
        first = firsts.setdefault(outcome.task, outcome)
        if first is not outcome:
            outcome.compared["first"] = vars(compare(first.records, outcome.records))
        if evaluation.against is not None:
            old = read_records(answers_file(evaluation.against, outcome.task, outcome.label))[1]
            outcome.compared["against"] = vars(compare(old, outcome.records))


def write_results(contestants: Sequence[Contestant], outcomes: Sequence[Outcome], evaluation: Evaluation) -> None:
    """Write `results.json`: the models, the settings that were given, and a result for each task and model."""
    values = {
        "models": [
            {"label": each.label, "checkpoint": each.checkpoint, "adapter": each.adapter} for each in contestants
        ],
        "settings": {
            "seed": evaluation.seed,
            "batch_size": evaluation.batch_size,
            "dtype": evaluation.dtype,
            "sampler": evaluation.sampler.given,
            "raw": evaluation.raw,
            "few_shot": evaluation.few_shot,
            "limit": evaluation.limit,
        },
        "results": [
            {
                "task": outcome.task,
                "model": outcome.label,
                **({"metrics": outcome.result} if outcome.task not in TASKS else outcome.result),
                "compared": outcome.compared,
                "file": answers_file(evaluation.output, outcome.task, outcome.label).name,
                "seconds": round(outcome.seconds, 3),
            }
            for outcome in outcomes
        ],
    }
    path = evaluation.output / RESULTS
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None
