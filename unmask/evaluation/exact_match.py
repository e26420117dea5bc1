"""Exact match: sample an answer to each question, grade it, and say how sure the share of right ones is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unmask import rng
from unmask.config.sampler import SamplerConfig
from unmask.distributed.inference import divide_rows
from unmask.distributed.ranks import ALONE, Ranks
from unmask.evaluation.grade import Grade, Interval, check_grader, grade, wilson
from unmask.evaluation.tasks import Question
from unmask.sampling.generate import DEFAULT_BATCH_SIZE, Generation, generate
from unmask.sampling.prompts import as_document, check_prompts, encode_prompts
from unmask.sampling.settings import settings_for

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Batches between two saves of an evaluation's answers: enough to keep the sampler's batches full, few enough that an
# interruption costs little.
BATCHES_BETWEEN_SAVES = 4


@dataclass(frozen=True)
class Answer:
    """One graded answer.

    Attributes:
        row: number of its question, from 0.
        text: the answer up to the first stop string.
        token_ids: its tokens, those behind a stop string included.
        finish_reason, nfe: as `Generation` has them.
        grade: whether it is correct.
    """

    row: int
    text: str
    token_ids: list[int]
    finish_reason: str
    nfe: int
    grade: Grade


@dataclass(frozen=True)
class Scored:
    """Graded answers, one a question, in their order."""

    answers: list[Answer]

    @property
    def right(self) -> int:
        """Number of right answers."""
        return sum(answer.grade.correct for answer in self.answers)

    @property
    def total(self) -> int:
        """Number of questions."""
        return len(self.answers)

    @property
    def exact_match(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.total

    @property
    def interval(self) -> Interval:
        """95 % interval of that share (Wilson)."""
        return wilson(self.right, self.total)


def score_answers(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sampler: SamplerConfig | None = None,
    seed: int = 42,
    batch_size: int | None = None,
    grader: str = "number",
    stops: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Scored:
    """Sample an answer to each question and grade it.

    An answer is a function of the weights, the question, the sampler and the seed; a question that comes twice draws
    other numbers the second time. Batch size and number of ranks change no draws, only how matrix products round, and
    with it a choice between two that tie in the model's precision.

    Args:
        model: from `unmask.load_model`, whole on every rank. Ranks that share a model in shards must make the same
            calls: give all of them the same questions and leave `ranks` out.
        questions: from `read_questions`, at least one.
        tokenizer: the model's.
        sampler: as for `unmask.generate`.
        seed: of the draws.
        batch_size: rows denoised together; None = `unmask.generate`'s.
        grader: a key of GRADERS: `number` (GSM8K's `####` or last number), `text` or `expression`.
        stops: stop strings; an answer is cut at the first of them before it is graded.
        ranks: among whom the questions are divided; a collective.

    Raises:
        MissingDependencyError: the grader needs a package that is not installed.
        SamplingError: as `unmask.generate`.
    """
    check_grader(grader)
    prompts = encode_questions(model, questions, tokenizer)
    run = TaskRun(model, questions, prompts, tokenizer, sampler, seed, batch_size, grader, tuple(stops), ranks)
    run.check_prompts()
    answers = run.answers()
    return Scored(sorted(answers, key=lambda answer: answer.row))


def encode_questions(
    model: Any, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Return the token ids of each question's prompt; of the model only its config is looked at.

    Raises:
        SamplingError: a prompt that the chat template cannot render, with the label of its row.
    """
    raw = isinstance(questions[0].prompt, str)  # literal text and chats do not share a file
    mask_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    labels = [question.label for question in questions]
    encoded = encode_prompts([each.as_prompt() for each in questions], tokenizer, raw, mask_id, labels)
    return [tuple(as_document(ids, tokenizer) if raw else ids) for ids in encoded]


@dataclass(frozen=True)
class Chunk:
    """Questions that are answered together, by their rows; `repeat` counts how often their prompts came before."""

    rows: tuple[int, ...]
    repeat: int

    def seed(self, seed: int) -> int:
        """Return the seed of its draws: prompts that come again draw other numbers."""
        return seed if self.repeat == 0 else rng.key(seed, "evaluation/repeat", self.repeat) % 2**63


def divide(prompts: Sequence[tuple[int, ...]], size: int) -> list[Chunk]:
    """Divide prompts into chunks of at most `size`, no prompt twice in one.

    Prompts of like length come together, which saves padding, and long ones first, so that one that is too long for the
    memory shows at once.
    """
    times: dict[tuple[int, ...], int] = {}
    rounds: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        repeat = times.get(ids, 0)
        times[ids] = repeat + 1
        rounds.setdefault(repeat, []).append(row)
    chunks = []
    for repeat, rows in sorted(rounds.items()):
        rows.sort(key=lambda row: (-len(prompts[row]), row))
        chunks += [Chunk(tuple(rows[start : start + size]), repeat) for start in range(0, len(rows), size)]
    return chunks


def rows_between_saves(batch_size: int | None) -> int:
    """Return how many prompts one process answers between two saves."""
    return BATCHES_BETWEEN_SAVES * (batch_size or DEFAULT_BATCH_SIZE)


@dataclass(frozen=True)
class TaskRun:
    """One task's questions for one model; what is not here is as in `score_answers`.

    Attributes:
        prompts: token ids of each question's prompt.
        together: the context in which ranks call a model that they share, from `load_for_answers`.
    """

    model: Any
    questions: Sequence[Question]
    prompts: Sequence[tuple[int, ...]]
    tokenizer: Any
    sampler: SamplerConfig | None
    seed: int
    batch_size: int | None
    grader: str
    stops: tuple[str, ...] = ()
    ranks: Ranks = ALONE
    together: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def check_prompts(self) -> None:
        """Raise SamplingError, with the label of its row, for a prompt that does not fit the model."""
        labels = [question.label for question in self.questions]
        check_prompts(self.prompts, labels, self.model.config, settings_for(self.model, self.sampler))

    def chunks(self) -> list[Chunk]:
        """Divide the questions into chunks: the same ones, whatever was answered already."""
        return divide(self.prompts, self.ranks.size * rows_between_saves(self.batch_size))

    def answers(self) -> list[Answer]:
        """Answer and grade all questions, chunk by chunk; a collective."""
        return [answer for chunk in self.chunks() for answer in self.answer(chunk)]

    def answer(self, chunk: Chunk) -> list[Answer]:
        """Answer and grade the questions of a chunk, in the order of its rows; a collective."""

        def answered(rows: list[int]) -> list[Answer]:
            generations = self.sample(rows, chunk.seed(self.seed))
            return [self.graded(row, each) for row, each in zip(rows, generations, strict=True)]

        return divide_rows(list(chunk.rows), self.ranks, answered, self.together)

    def sample(self, rows: Sequence[int], seed: int, **options: Any) -> list[Generation]:
        """Sample an answer to the questions of some rows, on this rank alone; options as of `generate`."""
        return generate(
            self.model,
            [list(self.prompts[row]) for row in rows],
            tokenizer=self.tokenizer,
            sampler=self.sampler,
            seed=seed,
            batch_size=self.batch_size,
            labels=[self.questions[row].label for row in rows],
            **options,
        )

    def graded(self, row: int, generation: Generation) -> Answer:
        """Grade the answer to the question of a row."""
        text = cut_at(generation.text or "", self.stops)
        result = grade(text, self.questions[row].reference, self.grader)
        return Answer(row, text, generation.token_ids, generation.finish_reason, generation.stats.nfe, result)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first place at which any stop string begins; empty stops are ignored."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
