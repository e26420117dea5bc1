"""Measure one task for one checkpoint: compute the records that its file lacks, save them, and sum the file up.

A file belongs to one evaluation of one set of questions: its first line says everything that decides the records, and
each further line is the record of a row. Records hold no times and no machine, so two runs leave the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unmask.data.conversation import Message
from unmask.data.template_loading import load_template
from unmask.distributed.inference import divide_rows
from unmask.distributed.ranks import from_first
from unmask.errors import DataError, ModelError
from unmask.evaluation.canvas_likelihood import DEFAULT_LEVELS, ar_log_likelihood, denoising_cross_entropy
from unmask.evaluation.exact_match import Answer, TaskRun
from unmask.evaluation.grade import wilson
from unmask.evaluation.job import Likelihoods
from unmask.evaluation.likelihood import DEFAULT_SAMPLES, Pair, log_likelihoods, method_for
from unmask.evaluation.tasks import Question
from unmask.report import resumable
from unmask.report.metrics import is_number
from unmask.report.resumable import Kind, Record
from unmask.sampling.generate import DEFAULT_BATCH_SIZE
from unmask.sampling.settings import SamplerSettings

# Answers that each process scores between two saves of a likelihood evaluation.
PAIRS_BETWEEN_SAVES = 64
Progress = Callable[[int, int, int], None]  # rows done, rows in all, rows of these that were just done


def _is_record(record: Record) -> bool:
    """Say whether a line of a file has the numbers that are summed up, of an answer or of a likelihood."""
    if "correct" in record:
        return (
            type(record["correct"]) is bool
            and type(record["nfe"]) is type(record["batch_size"]) is int
            and record["nfe"] > 0
            and isinstance(record["token_ids"], list)
            and isinstance(record["finish_reason"], str)
        )
    names = ["log_likelihood"] if "log_likelihood" in record else ["denoising_cross_entropy", "ar_log_likelihood"]
    error = record["standard_error"]
    numbers = [record[name] for name in names] + ([] if error is None else [error])
    return type(record["tokens"]) is int and record["tokens"] > 0 and all(map(is_number, numbers))


_FILE = Kind("evaluation", _is_record)


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return the first line of a file and its records; raises as `resumable.read_records`."""
    return resumable.read_records(path, _FILE)


def measure_answers(run: TaskRun, path: Path, model_identity: Mapping[str, Any], progress: Progress) -> list[Record]:
    """Answer and grade the questions that a file lacks; return all records in the order of rows. A collective.

    The first rank alone reads and writes the file, and calls `progress` after each save. The answers depend on the run
    and on `model_identity`, which is plain JSON values.

    Raises:
        ConfigError: the file is of another evaluation.
        SamplingError: a prompt that does not fit the model.
    """
    run.check_prompts()
    chunks = {chunk.rows: chunk for chunk in run.chunks()}

    def answered(rows: Sequence[int]) -> list[Record]:
        return [_answer_record(answer, run) for answer in run.answer(chunks[tuple(rows)])]

    identity = answers_identity(
        model_identity, run.loaded.settings, run.questions, run.prompts, run.seed, run.grader, run.stops
    )
    return _complete(run, path, identity, list(chunks), answered, progress)


def answers_identity(
    model_identity: Mapping[str, Any],
    settings: SamplerSettings,
    questions: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    seed: int,
    grader: str,
    stops: Sequence[str],
) -> dict[str, Any]:
    """Return everything that decides the answers, as plain JSON values."""
    return {
        **model_identity,
        "grader": grader,
        "seed": seed,
        "sampler": as_plain(settings.values),
        "stops": list(stops),
        "rows": len(questions),
        "questions": _fingerprint(zip(prompts, (question.reference for question in questions), strict=True)),
    }


def measure_likelihood(
    run: TaskRun, path: Path, model_identity: Mapping[str, Any], options: Likelihoods, progress: Progress
) -> list[Record]:
    """As `measure_answers`, for the likelihood of the reference answers; sampler and grader play no part."""
    model, ranks = run.loaded.model, run.loaded.ranks
    method = method_for(LIKELIHOODS, model, "--tasks likelihood", "leave the task out")
    if options.antithetic and not method.antithetic:
        raise ModelError("--antithetic: pairs of complementary masks need a model with a mask token; leave it out")
    if options.num_samples is None:
        options = dataclasses.replace(options, num_samples=method.num_samples)
    pairs = answer_pairs(run)
    identity = {
        **model_identity,
        "measure": method.measure,
        "seed": run.seed,
        **dataclasses.asdict(options),
        "rows": len(pairs),
        "questions": _fingerprint(pairs),
    }
    longest_first = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row][0]) - len(pairs[row][1]), row))
    size = PAIRS_BETWEEN_SAVES * ranks.size
    units = [longest_first[start : start + size] for start in range(0, len(pairs), size)]

    def scored(rows: list[int]) -> list[Record]:
        numbers = method.score(model, [pairs[row] for row in rows], options, run.seed, run.batch_size)
        return [{"row": row, "tokens": len(pairs[row][1]), **each} for row, each in zip(rows, numbers, strict=True)]

    def compute(rows: Sequence[int]) -> list[Record]:
        return divide_rows(rows, ranks, scored, run.loaded.joint_calls)

    return _complete(run, path, identity, units, compute, progress)


@dataclass(frozen=True)
class LikelihoodMethod:
    """How models of one kind of noise and attention score a given answer."""

    measure: str  # in the first line of a file
    num_samples: int  # masks or noise levels unless the caller says otherwise
    antithetic: bool  # whether masks can come in complementary pairs
    # (model, pairs, options, seed, batch size) → the numbers of each pair by name
    score: Callable[[Any, Sequence[Pair], Likelihoods, int, int | None], list[dict[str, Any]]]


def _bounds(
    model: Any, pairs: Sequence[Pair], options: Likelihoods, seed: int, batch_size: int | None
) -> list[dict[str, Any]]:
    samples, pairing = options.num_samples or DEFAULT_SAMPLES, options.antithetic
    estimates = log_likelihoods(
        model, pairs, samples, seed, batch_size=batch_size, antithetic=pairing, exact_if_cheaper=True
    )
    return [{"log_likelihood": each.value, "standard_error": _known(each.standard_error)} for each in estimates]


def _canvas_scores(
    model: Any, pairs: Sequence[Pair], options: Likelihoods, seed: int, batch_size: int | None
) -> list[dict[str, Any]]:
    levels = options.num_samples or DEFAULT_LEVELS
    denoised = [denoising_cross_entropy(model, *pair, levels, seed, batch_size=batch_size) for pair in pairs]
    return [
        {
            "denoising_cross_entropy": each.value,
            "standard_error": _known(each.standard_error),
            "ar_log_likelihood": ar_log_likelihood(model, *pair).value,
        }
        for pair, each in zip(pairs, denoised, strict=True)
    ]


# (noise, attention) → how a given answer is scored. A combination that is not here is refused.
LIKELIHOODS: dict[tuple[str, str], LikelihoodMethod] = {
    ("mask", "bidirectional"): LikelihoodMethod("log-likelihood bound", DEFAULT_SAMPLES, True, _bounds),
    ("uniform", "canvas"): LikelihoodMethod(
        "denoising cross-entropy, autoregressive log-likelihood", DEFAULT_LEVELS, False, _canvas_scores
    ),
}


def _complete(
    run: TaskRun,
    path: Path,
    identity: Mapping[str, Any],
    units: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], list[Record]],
    progress: Progress,
) -> list[Record]:
    """Compute and save the units of rows that a file lacks, one after another; return all records. A collective.

    Units do not depend on what is there: a unit that was cut short is computed again whole, so that the file comes out
    as it would have without an interruption.
    """
    kept = from_first(run.loaded.ranks, lambda: resumable.resume_records(path, _FILE, identity, units))
    records = {record["row"]: record for record in kept}
    for unit in units:
        if unit[0] in records:
            continue
        new = compute(unit)
        if run.loaded.ranks.first:
            resumable.append_records(path, new)
            records.update((record["row"], record) for record in new)
            progress(len(records), len(run.questions), len(new))
    return [records[row] for row in sorted(records)]


def answer_pairs(run: TaskRun) -> list[Pair]:
    """Return the tokens of each prompt and of its reference answer, in a chat with what closes the answer's turn."""
    tokenizer, mask_id, template = run.loaded.tokenizer, run.loaded.mask_id, None
    assert tokenizer is not None
    pairs: list[Pair] = []
    for question, prompt in zip(run.questions, run.prompts, strict=True):
        if isinstance(question.prompt, str):
            answer = tokenizer.encode(f" {question.reference}", add_special_tokens=False)
            pairs.append((prompt, tuple(answer)))
            continue
        if template is None:
            template = load_template(tokenizer, control_ids=() if mask_id is None else (mask_id,))
        try:
            encoded = template.encode([*question.prompt, Message("assistant", question.reference)], last_only=True)
        except DataError as error:
            raise DataError(f"{question.label}: {error}") from None
        start = encoded.supervised.index(True)
        end = start + encoded.supervised[start:].index(False) if False in encoded.supervised[start:] else None
        pairs.append((tuple(encoded.ids[:start]), tuple(encoded.ids[start:end])))
    return pairs


def sum_answers(records: Sequence[Record]) -> dict[str, Any]:
    """Return exact match over all answers, its 95 % interval, and how the answers ended."""
    right, total = sum(record["correct"] for record in records), len(records)
    interval = wilson(right, total)
    nfe = sum(record["nfe"] for record in records)
    return {
        "exact_match": right / total,
        "low": interval.low,
        "high": interval.high,
        "right": right,
        "total": total,
        "ended": sum(record["finish_reason"] == "eos" for record in records) / total,
        "network_calls": nfe / total,
        "tokens_per_forward": sum(len(record["token_ids"]) for record in records) / nfe,
    }


def sum_likelihoods(records: Sequence[Record]) -> dict[str, Any]:
    """Return nats a token over all answers, of the kind that the records have, with the standard error of the noise."""
    tokens = sum(record["tokens"] for record in records)
    counts = {"rows": len(records), "tokens": tokens}
    if "log_likelihood" in records[0]:
        nats = -math.fsum(record["log_likelihood"] for record in records) / tokens
        error = _mean_error(records, tokens)
        return {**counts, "nats_per_token": nats, "standard_error": error, "perplexity_bound": _perplexity(nats)}
    denoising = math.fsum(record["denoising_cross_entropy"] * record["tokens"] for record in records) / tokens
    nats = -math.fsum(record["ar_log_likelihood"] for record in records) / tokens
    return {
        **counts,
        "denoising_nats_per_token": denoising,
        "standard_error": _mean_error(records, tokens, per_token=True),
        "ar_nats_per_token": nats,
        "ar_perplexity": _perplexity(nats),
    }


def _perplexity(nats: float) -> float | None:
    """Return e^nats; None where it overflows, which JSON cannot say."""
    return math.exp(nats) if nats < 700 else None


def _mean_error(records: Sequence[Record], tokens: int, per_token: bool = False) -> float | None:
    """Return the standard error of nats a token over all answers; None where that of one answer is unknown."""
    if any(record["standard_error"] is None for record in records):
        return None
    errors = (record["standard_error"] * (record["tokens"] if per_token else 1) for record in records)
    return math.sqrt(math.fsum(error**2 for error in errors)) / tokens


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error  # JSON has no nan


def _answer_record(answer: Answer, run: TaskRun) -> Record:
    question = run.questions[answer.row]
    return {
        "row": answer.row,
        "place": question.label.rsplit("/", 1)[-1],
        "correct": answer.grade.correct,
        "extracted": answer.grade.extracted,
        "expected": answer.grade.expected,
        "text": answer.text,
        "reference": question.reference,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "nfe": answer.nfe,
        "batch_size": run.batch_size or DEFAULT_BATCH_SIZE,
    }


def as_plain(value: Any) -> Any:
    """Return a value as it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=list))


def _fingerprint(items: Any) -> str:
    digest = blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()
