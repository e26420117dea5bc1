"""Exact match: sample an answer to each question, grade it, and say how sure the share of right ones is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from unmask import rng
from unmask.config.sampler import SamplerConfig
from unmask.distributed.inference import divide_rows
from unmask.distributed.ranks import ALONE, Ranks
from unmask.evaluation.grade import Grade, Interval, check_grader, grade, wilson
from unmask.evaluation.tasks import Question
from unmask.models.registry import family_of
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.engine.loop import denoise
from unmask.sampling.engine.state import Request, Template
from unmask.sampling.generate import DEFAULT_BATCH_SIZE, Generation
from unmask.sampling.generate import answer as sample_answers
from unmask.sampling.jobs import LoadedModel, as_loaded
from unmask.sampling.prompts import as_document, check_prompts, encode_prompts
from unmask.sampling.settings import family_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Batches between two saves of an evaluation's answers: enough to keep the sampler's batches full, few enough that an
# interruption costs little.
BATCHES_BETWEEN_SAVES = 4


@dataclass(frozen=True)
class Answer:
    """The graded answer to the question number `row`.

    `text` ends before the first stop string; the rest is as `Generation` has it.
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
        tokenizer, sampler, seed, batch_size: as in `unmask.generate`.
        grader: a key of GRADERS: `number` (GSM8K's `####` or last number), `text` or `expression`.
        stops: stop strings; an answer is cut at the first of them before it is graded.
        ranks: among whom the questions are divided; a collective.

    Raises:
        MissingDependencyError: the grader needs a package that is not installed.
        SamplingError: as `unmask.generate`.
    """
    check_grader(grader)
    loaded = replace(as_loaded(model, tokenizer, sampler), ranks=ranks)
    prompts = encode_questions(questions, tokenizer, loaded.config)
    run = TaskRun(loaded, questions, prompts, seed, batch_size, grader, tuple(stops))
    run.check_prompts()
    answers = run.answers()
    return Scored(sorted(answers, key=lambda answer: answer.row))


def encode_questions(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: Any
) -> list[tuple[int, ...]]:
    """Return the token ids of each question's prompt for a model with this configuration.

    Raises:
        SamplingError: a prompt that the chat template cannot render, with the label of its row.
    """
    raw = isinstance(questions[0].prompt, str)  # literal text and chats do not share a file
    prompts, labels = [each.as_prompt() for each in questions], [each.label for each in questions]
    encoded = encode_prompts(prompts, tokenizer, raw, config.mask_token_id, labels)
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
    times: Counter[tuple[int, ...]] = Counter()
    rounds: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        rounds.setdefault(times[ids], []).append(row)
        times[ids] += 1
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
    """One task's questions for one model, with the token ids of their prompts; the rest as in `score_answers`."""

    loaded: LoadedModel
    questions: Sequence[Question]
    prompts: Sequence[tuple[int, ...]]
    seed: int
    batch_size: int | None
    grader: str
    stops: tuple[str, ...] = ()

    def check_prompts(self) -> None:
        """Raise SamplingError, with the label of its row, for a prompt that does not fit the model."""
        labels = [question.label for question in self.questions]
        check_prompts(self.prompts, labels, self.loaded.config, self.loaded.settings)

    def chunks(self) -> list[Chunk]:
        """Divide the questions into chunks: the same ones, whatever was answered already."""
        return divide(self.prompts, self.loaded.ranks.size * rows_between_saves(self.batch_size))

    def answers(self) -> list[Answer]:
        """Answer and grade all questions, chunk by chunk; a collective."""
        return [each for chunk in self.chunks() for each in self.answer(chunk)]

    def answer(self, chunk: Chunk) -> list[Answer]:
        """Answer and grade the questions of a chunk, in the order of its rows; a collective."""

        def answered(rows: list[int]) -> list[Answer]:
            generations = self.sample(rows, chunk.seed(self.seed))
            return [self.graded(row, each) for row, each in zip(rows, generations, strict=True)]

        return divide_rows(list(chunk.rows), self.loaded.ranks, answered, self.loaded.joint_calls)

    def sample(self, rows: Sequence[int], seed: int, **options: Any) -> list[Generation]:
        """Sample an answer to the questions of some rows, on this rank alone; options as of `generate.answer`."""
        prompts, labels = [list(self.prompts[row]) for row in rows], [self.questions[row].label for row in rows]
        return sample_answers(self.loaded, prompts, labels, seed, self.batch_size, **options)

    def graded(self, row: int, generation: Generation) -> Answer:
        """Grade the answer to the question of a row."""
        text = cut_at(generation.text or "", self.stops)
        result = grade(text, self.questions[row].reference, self.grader)
        return Answer(row, text, generation.token_ids, generation.finish_reason, generation.stats.nfe, result)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first place at which any stop string begins; empty stops are ignored."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def greedily_written(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int | None = None
) -> list[bool]:
    """Say for each pair of a prompt and an answer whether greedy decoding writes that answer, of known length.

    Greedy is LLaDA's sampler with one token a call, the most probable first, and no temperature. A row leaves at the
    first token that is not the answer's, nearly always the first of all.
    """
    settings = family_settings(family_of(model.config), steps=max((len(answer) for _, answer in pairs), default=1))
    requests = [
        Request(index, prompt, 0, Template([0] * len(answer), [True] * len(answer), [0] * len(answer)), answer)
        for index, (prompt, answer) in enumerate(pairs)
    ]
    requests.sort(key=lambda request: sum(map(len, pairs[request.index])))  # little padding
    written = [False] * len(pairs)
    for event in denoise(backend_for(model, settings), requests, settings, batch_size=batch_size or DEFAULT_BATCH_SIZE):
        for row in event.finished_B.nonzero()[:, 0].tolist():
            answer = event.answer_BC[row, : event.lengths[row]].tolist()
            written[event.rows[row]] = answer == list(pairs[event.rows[row]][1])
    return written
