"""Exact match: ask a model questions through the sampling engine, judge its answers, say how sure the share is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unmask import rng
from unmask.distributed.ranks import ALONE, Ranks
from unmask.distributed.rows import divide_rows
from unmask.errors import SamplingError
from unmask.evaluation.grade import Grade, check_grader, grade
from unmask.evaluation.interval import Interval, wilson
from unmask.evaluation.questions import Question

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from unmask.config.sampler import SamplerConfig
    from unmask.sampling.generate import Generation

# Batches between two saves of an evaluation's answers: enough for the engine to keep its batches full, few enough that
# an interruption costs little.
BATCHES_BETWEEN_SAVES = 4


@dataclass(frozen=True)
class Answer:
    """One judged answer.

    Attributes:
        row: number of its question, from 0.
        text: what the model wrote, up to the first stop string.
        token_ids: its tokens, before any stop string was looked for.
        finish_reason: as `Generation.finish_reason`.
        nfe: network calls that it took part in.
        grade: the judgement.
    """

    row: int
    text: str
    token_ids: list[int]
    finish_reason: str
    nfe: int
    grade: Grade


@dataclass(frozen=True)
class Scored:
    """A judged set of answers.

    Attributes:
        answers: one a question, in their order.
    """

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
    """Let a model answer questions and judge the answers.

    An answer is a function of the weights, the question, the sampler and the seed. A question that is asked twice draws
    other numbers the second time. The batch size and the number of ranks change the draws of none; they change how
    matrix products round, and with it a choice between two that tie in the model's precision.

    Args:
        model: from `unmask.load_model`, whole on every rank. Of a model that ranks share in shards every rank must make
            the same calls: give all of them the same questions and leave `ranks` out.
        questions: from `read_questions`, at least one.
        tokenizer: the model's.
        sampler: as for `unmask.generate`.
        seed: of the draws.
        batch_size: rows denoised together; None = `unmask.generate`'s.
        grader: a key of GRADERS: `number` (GSM8K's `####` or last number), `text` or `expression`.
        stops: texts at whose first place an answer is cut before it is judged.
        ranks: among whom the questions are divided; a collective.

    Raises:
        MissingDependencyError: the grader needs a package that is not installed.
        SamplingError: as `unmask.generate`.
    """
    check_grader(grader)
    asked = encode_questions(model, questions, tokenizer)
    asking = Asking(model, questions, asked, tokenizer, sampler, seed, batch_size, grader, tuple(stops), ranks)
    asking.check_prompts()
    found = {answer.row: answer for chunk in asking.chunks() for answer in asking.answer(chunk)}
    return Scored([found[row] for row in range(len(questions))])


def encode_questions(
    model: nn.Module, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Return the token ids of each question's prompt.

    Raises:
        SamplingError: a prompt that the chat template cannot render, with the place of its row.
    """
    from unmask.sampling.prompts import as_document, encode_prompts

    mask_id = getattr(getattr(model, "config", None), "mask_token_id", None)

    def encoded(some: Sequence[Question]) -> list[tuple[int, ...]]:
        raw = isinstance(some[0].prompt, str)  # literal text and chats do not share a file
        encoded = encode_prompts([one.as_prompt() for one in some], tokenizer, raw, mask_id)
        return [tuple(as_document(ids, tokenizer) if raw else ids) for ids in encoded]

    try:
        return encoded(questions)
    except SamplingError:
        for question in questions:
            try:
                encoded([question])
            except SamplingError as error:
                raise SamplingError(f"{question.place}: {str(error).removeprefix('prompt 0: ')}") from None
        raise


@dataclass(frozen=True)
class Chunk:
    """Questions that are answered together.

    Attributes:
        rows: their numbers.
        repeat: how often the same prompts were asked before.
    """

    rows: tuple[int, ...]
    repeat: int

    def seed(self, seed: int) -> int:
        """Return the seed of its draws: prompts that come again draw other numbers."""
        return seed if self.repeat == 0 else rng.key(seed, "evaluation/repeat", self.repeat) % 2**63


def divide(asked: Sequence[tuple[int, ...]], size: int, ends: Sequence[int] = ()) -> list[Chunk]:
    """Divide prompts into chunks of at most `size`.

    Prompts of like length come together, which saves padding, and long ones first, so that one that is too long for the
    model or the memory shows at once. No prompt is in a chunk twice, and no chunk goes beyond one of `ends`, numbers of
    first rows (ascending): those are divided as they would be alone.
    """
    times: dict[tuple[int, ...], int] = {}
    rounds: dict[tuple[int, int], list[int]] = {}
    for row, ids in enumerate(asked):
        repeat = times.get(ids, 0)
        times[ids] = repeat + 1
        rounds.setdefault((bisect_right(ends, row), repeat), []).append(row)
    found = []
    for (_, repeat), rows in sorted(rounds.items()):
        rows.sort(key=lambda row: (-len(asked[row]), row))
        found += [Chunk(tuple(rows[start : start + size]), repeat) for start in range(0, len(rows), size)]
    return found


def rows_between_saves(batch_size: int | None) -> int:
    """Return how many prompts one process answers between two saves."""
    from unmask.sampling.generate import DEFAULT_BATCH_SIZE

    return BATCHES_BETWEEN_SAVES * (batch_size or DEFAULT_BATCH_SIZE)


@dataclass(frozen=True)
class Asking:
    """One model, its questions and how it is asked; what is not here is as in `score_answers`.

    Attributes:
        asked: token ids of each question's prompt.
        together: the context in which ranks call a model that they share, from `load_for_answers`.
    """

    model: Any
    questions: Sequence[Question]
    asked: Sequence[tuple[int, ...]]
    tokenizer: Any
    sampler: SamplerConfig | None
    seed: int
    batch_size: int | None
    grader: str
    stops: tuple[str, ...] = ()
    ranks: Ranks = ALONE
    together: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def check_prompts(self) -> None:
        """Raise SamplingError, with the place of its row, for a prompt that does not fit the model."""
        from unmask.sampling.backends.backend import settings_for
        from unmask.sampling.prompts import check_prompts

        settings = settings_for(self.model, self.sampler)
        check_prompts(self.asked, [question.place for question in self.questions], self.model.config, settings)

    def chunks(self, ends: Sequence[int] = ()) -> list[Chunk]:
        """Divide the questions into chunks: the same ones, whatever was answered already; `ends` as in `divide`."""
        return divide(self.asked, self.ranks.size * rows_between_saves(self.batch_size), ends)

    def answer(self, chunk: Chunk) -> list[Answer]:
        """Answer and judge the questions of a chunk, in the order of its rows; a collective."""
        from unmask.sampling.generate import generate

        def answered(rows: list[int]) -> list[Answer]:
            prompts = [list(self.asked[row]) for row in rows]
            written = generate(
                self.model,
                prompts,
                tokenizer=self.tokenizer,
                sampler=self.sampler,
                seed=chunk.seed(self.seed),
                batch_size=self.batch_size,
            )
            return [self._judged(row, each) for row, each in zip(rows, written, strict=True)]

        try:
            return divide_rows(list(chunk.rows), self.ranks, answered, self.together)
        except SamplingError as error:
            place = self.questions[chunk.rows[0]].place
            raise SamplingError(f"{place} and others of its length: {error}") from None

    def _judged(self, row: int, written: Generation) -> Answer:
        text = cut_at(written.text or "", self.stops)
        judged = grade(text, self.questions[row].reference, self.grader)
        return Answer(row, text, written.token_ids, written.finish_reason, written.stats.nfe, judged)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first place at which any stop string begins; empty stops are ignored."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
