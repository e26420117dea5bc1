"""Validation during training: the loss on fixed noise, and exact match of sampled answers.

The same rows, noise levels and masks at every evaluation and in every run, and stratified levels whatever the training
uses: two points of a curve differ by the model alone. Beside the mean stands the loss by noise level. Noise and draws
have random streams of their own, so a run learns the same with validation and without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.batch import Batch, Corrupted, TokenLosses
from unmask.config.results import ValidationConfig
from unmask.distributed.inference import JointCalls, divide_rows
from unmask.distributed.ranks import ALONE, Ranks
from unmask.distributed.runtime import Runtime, free_gathered
from unmask.errors import ConfigError, SamplingError
from unmask.evaluation.exact_match import Answer, TaskRun, encode_questions
from unmask.evaluation.tasks import Question
from unmask.objectives.registry import Objective
from unmask.report.resumable import append_records
from unmask.rng import NoiseStream, key
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.jobs import LoadedModel
from unmask.sampling.prompts import check_prompts
from unmask.sampling.settings import SamplerSettings
from unmask.sampling.view import drawing_of

# Equal parts of the noise levels (0, 1] for which the loss is reported apart.
BUCKETS = 5
SAMPLES = "samples.jsonl"
_MASKED = "░"
_MOST_FRAMES = 32


@dataclass(frozen=True)
class FixedBatch:
    """One corrupted batch; one that is not `counted` only keeps this rank in step with others that have one more."""

    noisy: Corrupted
    counted: bool


def fixed_noise(objective: Objective, batches: Sequence[Batch], seed: int, ranks: Ranks = ALONE) -> list[FixedBatch]:
    """Corrupt this rank's share of the validation rows once.

    Batches of all rows are dealt out in turn, to every rank as many: ranks that share a model run it together.
    """
    stream = NoiseStream(seed, scope="validation")
    own = []
    for first in range(0, len(batches), ranks.size):
        together = batches[first : first + ranks.size]
        mine = together[min(ranks.rank, len(together) - 1)]
        peers_P = torch.cat([batch.peers_P for batch in together])
        noisy = objective.corrupt(dataclasses.replace(mine, peers_P=peers_P), stream)
        own.append(FixedBatch(noisy, ranks.rank < len(together)))
    return own


@torch.no_grad()
def validation_losses(
    model: nn.Module, objective: Objective, batches: Sequence[FixedBatch], runtime: Runtime
) -> dict[str, Any]:
    """Return the losses on all validation rows of all ranks, nats; the model's mode is restored.

    `loss` and `<term>_loss` are normalised as in training; `loss_by_noise_level` is, for each of five equal parts of
    the noise levels from the least on, the unweighted mean cross-entropy of a scored token, None where no token fell.
    """
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    with _in_eval(model):
        for part in batches:
            with runtime.autocast():
                terms = objective.token_losses(model, part.noisy.to(runtime.device))
            for name, term in terms.items():
                found = _sums(term) if part.counted else torch.zeros(2 + 2 * BUCKETS, dtype=torch.float64)
                sums[name] = sums[name] + found if name in sums else found
                weights[name] = term.weight
    if runtime.meshes is not None:
        free_gathered(model)
    names = sorted(sums)
    totals = torch.tensor(runtime.ranks.sum(torch.cat([sums[name] for name in names]).tolist()), dtype=torch.float64)
    by_term = dict(zip(names, totals.view(len(names), -1), strict=True))
    losses = {name: float(total[0] / total[1]) for name, total in by_term.items()}
    return {
        "loss": sum(weights[name] * value for name, value in losses.items()),
        **{f"{name}_loss": value for name, value in losses.items()},
        "loss_by_noise_level": _means(by_term),
    }


def _sums(term: TokenLosses) -> Tensor:
    """Return the weighted sum of a term and its count, then sum and count of plain cross-entropies in each bucket."""
    values_N, weights_N = term.cross_entropy_N.double(), term.weights_N.double()
    found = torch.zeros(2 + 2 * BUCKETS, dtype=torch.float64)
    found[0], found[1] = (values_N * weights_N).sum(), term.count
    if term.levels_N is not None:
        scored_N = (weights_N != 0).double()
        bucket_N = (term.levels_N * BUCKETS).long().clamp(0, BUCKETS - 1)
        found[2 : 2 + BUCKETS] = torch.bincount(bucket_N, values_N * scored_N, BUCKETS)
        found[2 + BUCKETS :] = torch.bincount(bucket_N, scored_N, BUCKETS)
    return found


def _means(by_term: Mapping[str, Tensor]) -> list[float | None]:
    """Return the mean of each bucket over the terms that have noise."""
    total = torch.stack(list(by_term.values())).sum(0)[2:].view(2, BUCKETS)
    return [float(value / count) if count else None for value, count in total.T]


def answer_validator(
    questions: Sequence[Question],
    section: ValidationConfig,
    settings: SamplerSettings,
    tokenizer: Any,
    config: Any,
    runtime: Runtime,
    seed: int,
    root: Path,
) -> Callable[[nn.Module, int], dict[str, Any]]:
    """Return what measures exact match: it takes the network and the step and returns an event's fields.

    Ranks divide the questions, and some answers are kept in the run directory `root`, as samples.jsonl. `tokenizer` has
    the chat template that training uses.

    Raises:
        ConfigError: a question that does not fit the model with its answer: now, and not after hours of training.
    """
    prompts = encode_questions(questions, tokenizer, config)
    try:
        check_prompts(prompts, [question.label for question in questions], config, settings)
    except SamplingError as error:
        raise ConfigError(f"validation.sampler: {error}, or take the row out") from None
    stream = key(seed, "validation/answers") % 2**63

    def measure(model: nn.Module, step: int) -> dict[str, Any]:
        together = nullcontext() if runtime.meshes is None else JointCalls(model, runtime.ranks, runtime.device)
        loaded = LoadedModel(model, tokenizer, settings, runtime.ranks, together)
        run = TaskRun(loaded, questions, prompts, stream, section.batch_size, section.grader)
        with runtime.autocast(), _in_eval(model):
            answers = run.answers()
            samples = _sample_answers(run, range(min(section.keep_samples, len(questions))))
        if runtime.meshes is not None:
            free_gathered(model)
        if runtime.ranks.first:
            append_records(root / SAMPLES, [{"event": "sample", "step": step, **sample} for sample in samples])
        right = sum(answer.grade.correct for answer in answers)
        return {"exact_match": right / len(answers), "right": right, "total": len(answers)}

    return measure


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _sample_answers(run: TaskRun, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Answer some questions once more, and return each answer with how it was denoised. A collective.

    `frames` holds the text after up to 32 of the network calls, the last included; `░` stands for a mask, and where
    noise is random tokens they stand there themselves.
    """
    loaded = run.loaded
    drawing = drawing_of(loaded, _MASKED * 2)

    def answered(own: list[int]) -> list[dict[str, Any]]:
        frames: list[list[dict[str, Any]]] = [[] for _ in own]

        def watch(event: StepEvent) -> None:
            for row, index in enumerate(event.rows):
                drawn = drawing.draw_row(event, row, highlight=False).plain
                frames[index].append({"nfe": int(event.nfe_B[row]), "text": drawn})

        answers = [run.graded(*each) for each in zip(own, run.sample(own, run.seed, on_event=watch), strict=True)]
        return [_shown(run.questions[each.row], each, _few(seen)) for each, seen in zip(answers, frames, strict=True)]

    return divide_rows(list(rows), loaded.ranks, answered, loaded.joint_calls) if rows else []


def _shown(question: Question, answer: Answer, frames: list[dict[str, Any]]) -> dict[str, Any]:
    prompt = question.prompt
    return {
        "row": question.label,
        "prompt": prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt),
        "text": answer.text,
        "reference": question.reference,
        "correct": answer.grade.correct,
        "nfe": answer.nfe,
        "frames": frames,
    }


def _few(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most so many frames, evenly chosen, the first and the last among them."""
    if len(frames) <= _MOST_FRAMES:
        return frames
    chosen = {round(number * (len(frames) - 1) / (_MOST_FRAMES - 1)) for number in range(_MOST_FRAMES)}
    return [frames[index] for index in sorted(chosen)]
