"""Exact match during training: answers to held-out rows, sampled as `unmask generate` would, graded, and some kept.

The draws have a random stream of their own and torch's global generator is not touched, so that a run learns the same
with it and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from unmask.config.results import ValidationConfig
from unmask.distributed.inference import JointCalls, divide_rows
from unmask.distributed.runtime import Runtime, free_gathered
from unmask.errors import ConfigError
from unmask.evaluation.exact_match import Answer, TaskRun, encode_questions
from unmask.evaluation.tasks import Question
from unmask.report.resumable import append_records
from unmask.rng import key
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.jobs import LoadedModel
from unmask.sampling.settings import SamplerSettings
from unmask.sampling.view import Drawing

SAMPLES = "samples.jsonl"
_MASKED = "░"
_MOST_FRAMES = 32


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

    Args:
        questions: all of them; ranks divide them.
        section: how they are asked.
        settings: of the sampler, in force.
        tokenizer: with the chat template that training uses.
        config: of the model.
        runtime: device and ranks.
        seed: the run's.
        root: the run directory, for samples.jsonl.

    Raises:
        ConfigError: a question that does not fit the model with its answer: now, and not after hours of training.
    """
    prompts = encode_questions(questions, tokenizer, config)
    room = config.max_sequence_length - settings.length
    for question, ids in zip(questions, prompts, strict=True):
        if len(ids) > room:
            raise ConfigError(
                f"validation.sampler: {question.label} asks in {len(ids)} tokens, and with the answer's length only "
                f"{room} fit the model's max_sequence_length {config.max_sequence_length}; lower max_new_tokens or "
                "take the row out"
            )
    stream = key(seed, "validation/answers") % 2**63

    def measure(model: nn.Module, step: int) -> dict[str, Any]:
        """Return exact match over all ranks at a step, and keep answers."""
        together = nullcontext() if runtime.meshes is None else JointCalls(model, runtime.ranks)
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
    assert loaded.tokenizer is not None
    drawing = Drawing(loaded.tokenizer, loaded.stop_ids, _MASKED * 2 if loaded.settings.noise == "mask" else None)

    def answered(own: list[int]) -> list[dict[str, Any]]:
        """Return the answers to this rank's questions."""
        frames: list[list[dict[str, Any]]] = [[] for _ in own]

        def watch(event: StepEvent) -> None:
            for row, index in enumerate(event.rows):
                drawn = drawing.draw_row(event, row, highlight=False).plain
                frames[index].append({"nfe": int(event.nfe_B[row]), "text": drawn})

        answers = [run.graded(*each) for each in zip(own, run.sample(own, run.seed, on_event=watch), strict=True)]
        return [_shown(run.questions[each.row], each, _few(seen)) for each, seen in zip(answers, frames, strict=True)]

    return divide_rows(list(rows), loaded.ranks, answered, loaded.together) if rows else []


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
