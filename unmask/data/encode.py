"""Encodes rows as the tokens that training sees: rendered, tokenised and cut to length, or dropped with a reason.

The process that needs a row encodes it and caches it, or worker processes encode rows ahead of their use.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from unmask.config.data import DatasetConfig
from unmask.data import worker
from unmask.data.chat import ChatTemplate, Encoded
from unmask.data.conversation import Conversation
from unmask.data.position import row_digest
from unmask.data.shown import UNREAD_KEY
from unmask.data.sources import Rows
from unmask.errors import DataError
from unmask.rng import generator

TOO_LONG = "longer than seq_length, and truncation is off"
NOTHING_LEFT = "no supervised token within seq_length"
MALFORMED = "malformed"

MOST_BYTES = 2**26  # of the rows that a process caches
_ROW_BYTES = 512  # of a cached row's Python objects, beside its arrays
_CHUNK = 16  # rows a task: sending a task costs about as much as encoding a row


@dataclass(frozen=True)
class EncodedRow:
    """A row of n tokens, n ≥ 1, at least one of them supervised.

    Attributes:
        input_ids: int64 (n,).
        supervised: bool (n,), True for the tokens that training learns.
        cut: whether it lost its end to `seq_length`.
        notes: what of the row is not in the tokens, in the same words for every row, so that notes can be counted.
        digest: of the row as read (`position.row_digest`).
        drawn: whether its answer was drawn from several, so that another epoch may see another.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    cut: bool = False
    notes: tuple[str, ...] = ()
    digest: int = 0
    drawn: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Dropped:
    """A row that is left out of training.

    Attributes:
        reason: in the same words for every row, so that reasons can be counted.
        detail: the error message of this row; "" when `reason` says all.
        digest: as in `EncodedRow`; 0 where the row cannot be read.
    """

    reason: str
    detail: str = ""
    digest: int = field(default=0, compare=False)


def encode_row(
    conversation: Conversation,
    template: ChatTemplate,
    config: DatasetConfig,
    last_only: bool,
    turns: int | None = None,
) -> EncodedRow | Dropped:
    """Return the tokens of a conversation, or of its first `turns`, at most `config.seq_length` of them.

    A longer row loses its end; where that leaves no supervised token, or `config.truncation` is off, it is dropped.

    Raises:
        DataError: the template refuses the conversation.
    """
    template = template.with_tools(conversation.tools)
    encoded = template.encode(conversation.messages[:turns], last_only, config.supervise_reasoning)
    too_long = len(encoded.ids) > config.seq_length
    if too_long and not config.truncation:
        return Dropped(TOO_LONG)
    supervised = np.array(encoded.supervised[: config.seq_length], dtype=bool)
    if not supervised.any():
        return Dropped(NOTHING_LEFT)
    return EncodedRow(
        np.array(encoded.ids[: config.seq_length], dtype=np.int64),
        supervised,
        too_long,
        _notes(conversation, template, encoded),
    )


def _notes(conversation: Conversation, template: ChatTemplate, encoded: Encoded) -> tuple[str, ...]:
    """Return what the row says and its tokens do not, a line for each thing."""
    unread = [f"the key {key!r}, which nothing reads" for key in conversation.unread]
    for turn in conversation.messages:
        unread += (f"the key {key!r} of a part, which nothing reads" for key in turn.unread)
        unread += (UNREAD_KEY.format(key) for key in turn.extra if not template.knows(key))
    return tuple(dict.fromkeys((*encoded.notes, *unread)))


def count_notes(
    encoded: Iterable[tuple[int, EncodedRow]], rows: Rows, noted: Counter[str], examples: dict[str, str]
) -> None:
    """Add the notes of rows, each given with its index, to counts, and the first place of each to the examples."""
    for index, row in encoded:
        for note in row.notes:
            noted[note] += 1
            examples.setdefault(note, rows.describe(index))


def count_dropped(index: int, row: Dropped, rows: Rows, dropped: Counter[str], examples: dict[str, str]) -> None:
    """Count a dropped row by its reason; the first of each reason becomes its example."""
    dropped[row.reason] += 1
    examples.setdefault(row.reason, row.detail or rows.describe(index))


@dataclass(frozen=True)
class RowEncoder:
    """Encodes a row of a source as an epoch sees it, for the loaders, in this process or in a worker.

    Attributes:
        config: the data set's section, with `answers` resolved.
        seed: keys the draw of answers.
        where: name of the section, for messages.
    """

    rows: Rows
    template: ChatTemplate
    config: DatasetConfig
    seed: int = 0
    where: str = "dataset"

    def __call__(self, index: int, epoch: int) -> EncodedRow | Dropped:
        """Return row `index`; DataError when it is malformed or refused, and `on_malformed` is "error"."""
        try:
            conversation = self.rows[index]
        except DataError as error:  # it names its place already
            if self.config.on_malformed == "error":
                raise
            return Dropped(MALFORMED, str(error))
        digest = row_digest(conversation)
        try:
            return replace(self._encode(conversation, index, epoch), digest=digest)
        except DataError as error:
            place = self.rows.describe(index)
            if self.config.on_malformed == "error":
                raise DataError(f"{place}: {error}; fix the row or set {self.where}.on_malformed: skip") from None
            return Dropped(MALFORMED, f"{place}: {error}", digest)

    def _encode(self, conversation: Conversation, index: int, epoch: int) -> EncodedRow | Dropped:
        assert self.config.answers is not None  # `unmask.config.data.resolve_answers` chose it
        if self.config.answers != "one":
            return encode_row(conversation, self.template, self.config, self.config.answers == "last")
        template, messages = self.template.with_tools(conversation.tools), conversation.messages
        ends = [answer.stop for answer in template.answers(messages)]
        if len(ends) > 1:
            # So that whether a row is refused does not depend on the draw.
            template.check_conversation(messages[: ends[-1]], self.config.supervise_reasoning)
        row: EncodedRow | Dropped = Dropped(NOTHING_LEFT)
        # The first that fits, of the answers in random order, is drawn uniformly from those that fit.
        for choice in generator(self.seed, "data/answer", epoch, index).permutation(len(ends)):
            row = encode_row(conversation, self.template, self.config, True, ends[choice])
            if isinstance(row, EncodedRow):
                return replace(row, drawn=len(ends) > 1)
        return row


Encode = Callable[[int, int], EncodedRow | Dropped]  # row, epoch → its tokens


class RememberedRows:
    """A cache around `encode`, without dropped rows and rows whose answer is drawn anew in each epoch.

    When it is full it keeps what it has. Rows come in a new order each epoch, so these are as good as any others, and
    an LRU cache smaller than the data would throw each row out before it comes again.
    """

    def __init__(self, encode: Encode, most_bytes: int = MOST_BYTES) -> None:
        self._encode = encode
        self._left = most_bytes
        self._rows: dict[int, EncodedRow] = {}

    def __call__(self, index: int, epoch: int) -> EncodedRow | Dropped:
        """Return row `index` as tokens; what `encode` raises is raised."""
        if index in self._rows:
            return self._rows[index]
        row = self._encode(index, epoch)
        if isinstance(row, EncodedRow) and not row.drawn:
            self._left -= row.input_ids.nbytes + row.supervised.nbytes + _ROW_BYTES
            if self._left >= 0:
                self._rows[index] = row
        return row


class Visit(NamedTuple):
    """A place in an epoch's order, the row that comes there, and the window of the order that it stands in."""

    epoch: int
    place: int
    index: int
    window: Sequence[int] | np.ndarray = ()


def encoded_ahead(
    encode: Encode, visits: Iterable[Visit], num_workers: int, lookahead: int
) -> Generator[tuple[Visit, EncodedRow | Dropped]]:
    """Yield each visit with its row, encode(index, epoch), in their order.

    Args:
        encode: a function of row and epoch alone; it must pickle if there are workers.
        visits: may be endless.
        num_workers: processes; 0 encodes in this one, when the row is asked for.
        lookahead: rows that workers may be ahead.

    Raises:
        DataError: raised by `encode`, or a worker died or could not be started.
    """
    if num_workers == 0:
        for visit in visits:
            yield visit, encode(visit.index, visit.epoch)
        return
    # Spawned, never forked: by now this process has torch's threads, and perhaps a device.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), worker.Start(), (encode,))
    remaining = iter(visits)
    pending: deque[tuple[list[Visit], Future[list[EncodedRow | Dropped]]]] = deque()
    tasks = max(2 * num_workers, -(-lookahead // _CHUNK))
    try:
        while True:
            while len(pending) < tasks and (chunk := list(islice(remaining, _CHUNK))):
                task = [(visit.index, visit.epoch) for visit in chunk]
                pending.append((chunk, _submitted(pool, task)))
            if not pending:
                return
            chunk, future = pending.popleft()
            yield from zip(chunk, future.result(), strict=True)
    except BrokenProcessPool:
        raise DataError(
            "dataloader.num_workers: a worker process died, perhaps killed for want of memory; lower num_workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, task: list[tuple[int, int]]) -> Future[list[EncodedRow | Dropped]]:
    """Give workers a task, for which one more of them may start."""
    try:
        return pool.submit(worker.encode_chunk, task)
    except OSError as error:  # no memory, or the user's limit of processes or open files
        raise DataError(
            f"dataloader.num_workers: a worker process could not be started ({error.strerror or error}); lower "
            "num_workers"
        ) from None
