"""Answers kept to be looked at: what a model wrote during training, and how each answer came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.distributed.inference import divide_rows
from unmask.errors import DataError
from unmask.evaluation.exact_match import TaskRun

if TYPE_CHECKING:
    from unmask.evaluation.tasks import Question
    from unmask.sampling.engine.loop import StepEvent

_MASKED = "░"
_MOST_FRAMES = 32


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        row: number of its question.
        text: the answer.
        correct: whether it is right.
        nfe: network calls that it took.
        frames: (network calls so far, text so far) at up to 32 of them, the last included; `░` stands for a mask, and
            where noise is random tokens they stand there themselves.
    """

    row: int
    text: str
    correct: bool
    nfe: int
    frames: list[tuple[int, str]]


def sample_answers(run: TaskRun, rows: Sequence[int]) -> list[Sample]:
    """Answer some questions once more and watch; the same on every rank. A collective."""
    if not rows:
        return []
    from unmask.sampling.jobs import as_loaded
    from unmask.sampling.view import Drawing

    loaded = as_loaded(run.model, run.tokenizer, run.sampler)
    shades = _MASKED * 2 if loaded.settings.noise == "mask" else None
    drawing = Drawing(run.tokenizer, loaded.stop_ids, shades)

    def answered(own: list[int]) -> list[Sample]:
        """Return this rank's samples."""
        frames: list[list[tuple[int, str]]] = [[] for _ in own]

        def watch(event: StepEvent) -> None:
            for place, number in enumerate(event.rows):
                drawn = drawing.draw_row(event, place, highlight=False).plain
                frames[number].append((int(event.nfe_B[place]), drawn))

        answers = [run.graded(*each) for each in zip(own, run.sample(own, run.seed, on_event=watch), strict=True)]
        return [
            Sample(each.row, each.text, each.grade.correct, each.nfe, _few(seen))
            for each, seen in zip(answers, frames, strict=True)
        ]

    return divide_rows(list(rows), run.ranks, answered, run.together)


def write_samples(path: Path, step: int, questions: Sequence[Question], samples: Sequence[Sample]) -> None:
    """Append a step's answers to a file, one JSON object a line; raises DataError."""
    lines: list[dict[str, Any]] = [
        {
            "event": "sample",
            "step": step,
            "row": questions[sample.row].label,
            "prompt": _shown(questions[sample.row]),
            "text": sample.text,
            "reference": questions[sample.row].reference,
            "correct": sample.correct,
            "nfe": sample.nfe,
            "frames": [{"nfe": nfe, "text": text} for nfe, text in sample.frames],
        }
        for sample in samples
    ]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free some space, then run again") from None


def _few(frames: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return at most so many frames, evenly chosen, the first and the last among them."""
    if len(frames) <= _MOST_FRAMES:
        return frames
    places = {round(number * (len(frames) - 1) / (_MOST_FRAMES - 1)) for number in range(_MOST_FRAMES)}
    return [frames[place] for place in sorted(places)]


def _shown(question: Question) -> str:
    prompt = question.prompt
    return prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)
