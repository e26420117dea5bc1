"""One task for one checkpoint: what is missing in its file is computed and saved, and the file summed up.

The records hold no times and no machine, so that two runs of the same evaluation leave the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

from unmask.data.chat import load_template
from unmask.data.conversation import Message
from unmask.distributed.ranks import from_first
from unmask.distributed.rows import divide_rows
from unmask.errors import DataError, ModelError
from unmask.evaluation.canvas_likelihood import (
    DEFAULT_LEVELS,
    ar_log_likelihood,
    denoising_cross_entropy,
    has_canvases,
)
from unmask.evaluation.exact_match import Answer, Asking
from unmask.evaluation.interval import wilson
from unmask.evaluation.likelihood import DEFAULT_SAMPLES, log_likelihoods
from unmask.evaluation.questions import Question
from unmask.evaluation.records import Record, append_records, grown_identity, resize_records, resume_records

# Answers between two saves of a likelihood evaluation.
PAIRS_BETWEEN_SAVES = 64
Progress = Callable[[int, int, int], None]  # rows done, rows in all, rows of these that were just done


@dataclass(frozen=True)
class Likelihoods:
    """How likelihoods are estimated; `num_samples` None = as many as the family's function takes by itself."""

    num_samples: int | None = None
    antithetic: bool = False


def measure_answers(asking: Asking, path: Path, model_identity: Mapping[str, Any], progress: Progress) -> list[Record]:
    """Answer and judge what is missing in a file; return all records in the order of rows. A collective.

    Args:
        asking: the model, the questions and the sampler.
        path: the file of the first rank.
        model_identity: what the answers depend on beside those, as plain JSON values.
        progress: called on the first rank after each save.

    Raises:
        ConfigError: the file is of another evaluation, or of more rows.
        SamplingError: a prompt that does not fit the model; no file is made.
    """
    asking.check_prompts()
    total = len(asking.questions)
    grown = from_first(
        asking.ranks, lambda: resize_records(path, lambda rows: answers_identity(asking, model_identity, rows), total)
    )
    identity = grown_identity(answers_identity(asking, model_identity), grown)
    chunks = asking.chunks([rows for rows, _ in grown])
    kept = from_first(asking.ranks, lambda: resume_records(path, identity, [chunk.rows for chunk in chunks]))
    records = {record["row"]: record for record in kept}
    for chunk in chunks:
        if chunk.rows[0] in records:
            continue
        new = [_answer_record(answer, asking.questions[answer.row], asking) for answer in asking.answer(chunk)]
        if asking.ranks.first:
            append_records(path, new)
            records.update((record["row"], record) for record in new)
            progress(len(records), total, len(new))
    return [records[row] for row in sorted(records)]


def answers_identity(asking: Asking, model_identity: Mapping[str, Any], rows: int | None = None) -> dict[str, Any]:
    """Return everything that decides the answers to the first rows (None = all), as plain JSON values.

    Of the model only its config is looked at.
    """
    from unmask.sampling.backends.backend import settings_for

    references = (question.reference for question in asking.questions[:rows])
    return {
        **model_identity,
        "grader": asking.grader,
        "seed": asking.seed,
        "sampler": as_plain(dataclasses.asdict(settings_for(asking.model, asking.sampler))),
        "stops": list(asking.stops),
        "rows": len(asking.questions[:rows]),
        "questions": _fingerprint(zip(asking.asked[:rows], references, strict=True)),
    }


def measure_likelihood(
    asking: Asking, path: Path, model_identity: Mapping[str, Any], options: Likelihoods, progress: Progress
) -> list[Record]:
    """As `measure_answers`, for how likely the model finds the given answers; the sampler and grader play no part."""
    pairs = answer_pairs(asking)
    canvases = has_canvases(asking.model)
    if canvases and options.antithetic:
        raise ModelError("--antithetic: pairs of complementary masks need a model with a mask token; leave it out")
    if options.num_samples is None:
        options = dataclasses.replace(options, num_samples=DEFAULT_LEVELS if canvases else DEFAULT_SAMPLES)

    def identity_of(rows: int) -> dict[str, Any]:
        return {
            **model_identity,
            "measure": "denoising cross-entropy, autoregressive log-likelihood" if canvases else "log-likelihood bound",
            "seed": asking.seed,
            **dataclasses.asdict(options),
            "rows": rows,
            "questions": _fingerprint(pairs[:rows]),
        }

    grown = from_first(asking.ranks, lambda: resize_records(path, identity_of, len(pairs)))
    identity = grown_identity(identity_of(len(pairs)), grown)
    units = _units(pairs, PAIRS_BETWEEN_SAVES * asking.ranks.size, [rows for rows, _ in grown])
    kept = from_first(asking.ranks, lambda: resume_records(path, identity, units))
    records = {record["row"]: record for record in kept}
    for unit in units:
        if unit[0] in records:
            continue
        new = divide_rows(
            unit, asking.ranks, lambda rows: _likelihood_records(asking, pairs, rows, options), asking.together
        )
        if asking.ranks.first:
            append_records(path, new)
            records.update((record["row"], record) for record in new)
            progress(len(records), len(pairs), len(new))
    return [records[row] for row in sorted(records)]


def _units(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], size: int, ends: Sequence[int]) -> list[list[int]]:
    """Return the rows that are saved together, at most `size`, the longest first; none goes beyond one of `ends`."""
    found = []
    for start, end in pairwise([0, *ends, len(pairs)]):
        order = sorted(range(start, end), key=lambda row: (-len(pairs[row][0]) - len(pairs[row][1]), row))
        found += [order[first : first + size] for first in range(0, len(order), size)]
    return found


def answer_pairs(asking: Asking) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the tokens of each prompt and of its reference answer, an answer in a chat with what closes its turn.

    Raises:
        DataError: a row that the chat template refuses.
    """
    template = None
    pairs = []
    for question, asked in zip(asking.questions, asking.asked, strict=True):
        if isinstance(question.prompt, str):
            answer = asking.tokenizer.encode(f" {question.reference}", add_special_tokens=False)
            pairs.append((asked, tuple(answer)))
            continue
        if template is None:
            mask = getattr(asking.model.config, "mask_token_id", None)
            template = load_template(asking.tokenizer, control_ids=() if mask is None else (mask,))
        try:
            encoded = template.encode([*question.prompt, Message("assistant", question.reference)], mask_history=True)
        except DataError as error:
            raise DataError(f"{question.place}: {error}") from None
        start = encoded.supervised.index(True)
        end = start + encoded.supervised[start:].index(False) if False in encoded.supervised[start:] else None
        pairs.append((tuple(encoded.ids[:start]), tuple(encoded.ids[start:end])))
    return pairs


def sum_answers(records: Sequence[Record]) -> dict[str, Any]:
    """Return the result of judged answers: exact match, its 95 % interval, and how the answers ended."""
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
    """Return nats a token over all answers, with the standard error of the noise; what kind, the records say."""
    tokens = sum(record["tokens"] for record in records)
    result: dict[str, Any] = {"rows": len(records), "tokens": tokens}
    if "log_likelihood" in records[0]:
        result["nats_per_token"] = -math.fsum(record["log_likelihood"] for record in records) / tokens
        error = _error_of_sum(records, per_token=False)
        result["standard_error"] = None if error is None else error / tokens
        result["perplexity_bound"] = _perplexity(result["nats_per_token"])
        return result
    total = math.fsum(record["denoising_cross_entropy"] * record["tokens"] for record in records)
    result["denoising_nats_per_token"] = total / tokens
    error = _error_of_sum(records, per_token=True)
    result["standard_error"] = None if error is None else error / tokens
    result["ar_nats_per_token"] = -math.fsum(record["ar_log_likelihood"] for record in records) / tokens
    result["ar_perplexity"] = _perplexity(result["ar_nats_per_token"])
    return result


def _perplexity(nats: float) -> float | None:
    """Return e^nats, None where that is beyond all numbers, which JSON has no word for."""
    return math.exp(nats) if nats < 700 else None


def _error_of_sum(records: Sequence[Record], per_token: bool) -> float | None:
    """Return the standard error of a sum over answers, None where that of one of them is not known."""
    errors = [(r["standard_error"], r["tokens"] if per_token else 1) for r in records]
    if any(error is None for error, _ in errors):
        return None
    return math.sqrt(math.fsum((error * factor) ** 2 for error, factor in errors))


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error  # JSON has no nan


def _answer_record(answer: Answer, question: Question, asking: Asking) -> Record:
    from unmask.sampling.generate import DEFAULT_BATCH_SIZE

    return {
        "row": answer.row,
        "place": question.place.rsplit("/", 1)[-1],
        "correct": answer.grade.correct,
        "extracted": answer.grade.extracted,
        "expected": answer.grade.expected,
        "text": answer.text,
        "reference": question.reference,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "nfe": answer.nfe,
        "batch_size": asking.batch_size or DEFAULT_BATCH_SIZE,
    }


def _likelihood_records(
    asking: Asking, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: Sequence[int], options: Likelihoods
) -> list[Record]:
    model, seed, size = asking.model, asking.seed, asking.batch_size
    number = {} if options.num_samples is None else {"num_samples": options.num_samples}
    if not has_canvases(model):
        found = log_likelihoods(
            model,
            [pairs[row] for row in rows],
            seed=seed,
            batch_size=size,
            antithetic=options.antithetic,
            exact_if_cheaper=True,
            **number,
        )
        return [
            {
                "row": row,
                "tokens": len(pairs[row][1]),
                "log_likelihood": each.value,
                "standard_error": _known(each.standard_error),
            }
            for row, each in zip(rows, found, strict=True)
        ]
    records = []
    for row in rows:
        noised = denoising_cross_entropy(model, *pairs[row], seed=seed, batch_size=size, **number)
        read = ar_log_likelihood(model, *pairs[row])
        records.append(
            {
                "row": row,
                "tokens": noised.tokens,
                "denoising_cross_entropy": noised.value,
                "standard_error": _known(noised.standard_error),
                "ar_log_likelihood": read.value,
            }
        )
    return records


def as_plain(value: Any) -> Any:
    """Return a value as it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=list))


def _fingerprint(items: Any) -> str:
    digest = blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()
