"""From a row to the tokens that training sees: render, tokenise, cut, or drop with a reason.

Rows are encoded in the process that asks for them, and remembered, or ahead of their use by worker processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from unmask.config.data import DatasetConfig
from unmask.data.chat import ChatTemplate, Encoded
from unmask.data.conversation import Conversation
from unmask.data.sources import Rows
from unmask.data.visited import row_digest
from unmask.errors import DataError

TOO_LONG = "longer than seq_length, and truncation is off"
NOTHING_LEFT = "no supervised token within seq_length"
MALFORMED = "malformed"

MOST_BYTES = 2**26  # of rows that one process remembers
_ROW_BYTES = 512  # of a row's objects beside its numbers
_CHUNK = 16  # rows a task: sending one costs about as much as encoding one
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedRow:
    """A row of n tokens, n ≥ 1, at least one of them supervised.

    Attributes:
        input_ids: int64 (n,).
        supervised: bool (n,), True where the loss may look.
        cut: whether it lost its end to `seq_length`.
        notes: what of the row is not in the tokens, though it trains; the same texts for all rows of a kind.
        digest: of the row as read (`visited.row_digest`).
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    cut: bool = False
    notes: tuple[str, ...] = ()
    digest: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Dropped:
    """A row that gives nothing to train on.

    Attributes:
        reason: the same text for all rows of its kind, so that it can be counted.
        detail: what was wrong with this very row; "" when `reason` says all.
        digest: as of an `EncodedRow`; 0 where the row cannot be read.
    """

    reason: str
    detail: str = ""
    digest: int = field(default=0, compare=False)


def encode_row(
    conversation: Conversation, template: ChatTemplate, config: DatasetConfig, seq_length: int
) -> EncodedRow | Dropped:
    """Return the tokens of a conversation, at most `seq_length` of them.

    A longer row loses its end; where that leaves no supervised token, or `config.truncation` is off, it is dropped.

    Raises:
        DataError: the template refuses the conversation.
    """
    template = template.with_tools(conversation.tools)
    encoded = template.encode(conversation.messages, config.mask_history, config.supervise_reasoning)
    too_long = len(encoded.ids) > seq_length
    if too_long and not config.truncation:
        return Dropped(TOO_LONG)
    supervised = np.array(encoded.supervised[:seq_length], dtype=bool)
    if not supervised.any():
        return Dropped(NOTHING_LEFT)
    return EncodedRow(
        np.array(encoded.ids[:seq_length], dtype=np.int64),
        supervised,
        too_long,
        _notes(conversation, template, encoded),
    )


def _notes(conversation: Conversation, template: ChatTemplate, encoded: Encoded) -> tuple[str, ...]:
    """Return a line for each thing that the row says and the tokens do not."""
    unread = [f"key {key!r}" for key in conversation.unread]
    for turn in conversation.messages:
        unread += (f"key {key!r} of a part" for key in turn.unread)
        unread += (f"key {key!r} of a turn" for key in turn.extra if not template.knows(key))
    if not unread and not encoded.notes:
        return ()
    return (*encoded.notes, *(f"{key} that nothing reads" for key in dict.fromkeys(unread)))


def count_notes(
    encoded: Iterable[tuple[int, EncodedRow]], rows: Rows, noted: Counter[str], examples: dict[str, str]
) -> None:
    """Add the notes of rows, each given with its index, to counts, and the first place of each to the examples."""
    for index, row in encoded:
        for note in row.notes:
            noted[note] += 1
            examples.setdefault(note, rows.describe(index))


@dataclass(frozen=True)
class RowEncoder:
    """Encodes row i of a source: what the loaders call, in this process or in a worker; `where` names its section."""

    rows: Rows
    template: ChatTemplate
    config: DatasetConfig
    where: str = "dataset"

    def __call__(self, index: int) -> EncodedRow | Dropped:
        """Return row `index`; DataError when it is malformed or refused, and `on_malformed` is "error"."""
        try:
            conversation = self.rows[index]
        except DataError as error:  # it names its place already
            if self.config.on_malformed == "error":
                raise
            return Dropped(MALFORMED, str(error))
        digest = row_digest(conversation)
        try:
            row = encode_row(conversation, self.template, self.config, self.config.seq_length)
            return replace(row, digest=digest)
        except DataError as error:
            place = self.rows.describe(index)
            if self.config.on_malformed == "error":
                raise DataError(f"{place}: {error}; fix the row or set {self.where}.on_malformed: skip") from None
            return Dropped(MALFORMED, f"{place}: {error}", digest)


Encode = Callable[[int], EncodedRow | Dropped]


class RememberedRows:
    """Gives what `encode`, a function of the index alone, gives; a row that trains is encoded once.

    When its memory is full it stays as it is: rows come in a new order each epoch, so the ones that it has are as good
    as any, while making room for the newest would throw each one out before its turn comes.
    """

    def __init__(self, encode: Encode, most_bytes: int = MOST_BYTES) -> None:
        self._encode = encode
        self._left = most_bytes
        self._rows: dict[int, EncodedRow] = {}

    def __call__(self, index: int) -> EncodedRow | Dropped:
        """Return row `index` as tokens; what `encode` raises is raised."""
        if index in self._rows:
            return self._rows[index]
        row = self._encode(index)
        if isinstance(row, EncodedRow):
            self._left -= row.input_ids.nbytes + row.supervised.nbytes + _ROW_BYTES
            if self._left >= 0:
                self._rows[index] = row
        return row


def encoded_ahead(
    encode: Encode, candidates: Iterable[tuple[T, int]], num_workers: int, lookahead: int
) -> Iterator[tuple[T, int, EncodedRow | Dropped]]:
    """Yield (place, index, encode(index)) for each candidate (place, index), in their order.

    Args:
        encode: a function of the row's index alone; it must pickle if there are workers.
        candidates: may be endless.
        num_workers: processes; 0 encodes in this one, when the row is asked for, and remembers it.
        lookahead: rows that workers may be ahead.

    Raises:
        DataError: raised by `encode`, or a worker died.
    """
    if num_workers == 0:
        remembered = RememberedRows(encode)
        for place, index in candidates:
            yield place, index, remembered(index)
        return
    # Started afresh, never forked: this process has torch's threads, and perhaps a device, by now.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (encode,))
    remaining = iter(candidates)
    pending: deque[tuple[list[tuple[T, int]], Future[list[EncodedRow | Dropped]]]] = deque()
    tasks = max(2 * num_workers, -(-lookahead // _CHUNK))
    try:
        while True:
            while len(pending) < tasks and (chunk := list(islice(remaining, _CHUNK))):
                pending.append((chunk, pool.submit(_encode_chunk, [index for _, index in chunk])))
            if not pending:
                return
            chunk, future = pending.popleft()
            for (place, index), row in zip(chunk, future.result(), strict=True):
                yield place, index, row
    except BrokenProcessPool:
        raise DataError(
            "dataloader.num_workers: a worker process died, perhaps killed for want of memory; lower num_workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encode: Any = None  # set once in each worker, so that the encoder is sent once and not with every task


def _start_worker(encode: Encode) -> None:
    global _worker_encode
    _worker_encode = encode
    # A signal to the process group (Ctrl-C, a cluster's SIGTERM) is for the main process alone, which saves and stops.
    # SIGTERM itself must keep its effect here: with it the pool ends the workers that are left when one has died.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns once it is gone, however it went; a pool's worker would wait for work for ever
    os._exit(1)


def _encode_chunk(indices: list[int]) -> list[EncodedRow | Dropped]:
    return [_worker_encode(index) for index in indices]
