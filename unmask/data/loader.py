"""The training loader: an endless stream of global batches, which can go on from a saved position (`position.py`).

Every rank composes the same global batch and takes its own rows from it; each row is encoded by one rank, and the ranks
exchange what they encoded. Which rows a batch holds depends on the seed, the epoch and the position, never on ranks,
micro-batches or workers. A row without anything to train on is passed over, and the next row of the order takes its
place. Rows at the end of an epoch that do not fill a batch are left out. Without shuffling they would be the same rows
in every epoch, so there they come first in the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.batch import Batch
from unmask.config.data import DataloaderConfig
from unmask.data.batches import collate, rounded
from unmask.data.encode import Dropped, Encode, EncodedRow, Visit, count_dropped, count_notes
from unmask.data.exchange import Gather, encoded_together
from unmask.data.position import DataOrder, Position, add_digests
from unmask.data.sources import Rows
from unmask.errors import ConfigError, DataError
from unmask.rng import generator


@dataclass(frozen=True)
class _GlobalBatch:
    """One step's rows, before they are divided among ranks and micro-batches.

    Attributes:
        rows: (sample id, tokens) of each, the longest first.
        start: place in the epoch's order at which the search for its rows began.
        end: the position after its last row.
        passed_over: (epoch, sample id, reason) of the rows passed over since the batch before it, some perhaps at the
            end of the epoch before.
    """

    rows: list[tuple[int, EncodedRow]]
    start: int
    end: Position
    passed_over: list[tuple[int, int, Dropped]]


class TrainLoader:
    """Iterates over steps; each is the list of this rank's micro-batches of one global batch.

    Args:
        encode: (row index, epoch) → the row's tokens in that epoch; must pickle if there are workers.
        global_batch_size: rows a step, over all ranks and micro-batches.
        local_batch_size: rows a micro-batch.
        seed: keys the order, and the slots of the rows in a batch.
        pad_token_id: padding; EOS where it is supervised.
        supervise_padding: padding is attended and supervised. Rows are then padded to the longest of their global
            batch, so that the loss does not depend on how it is divided; otherwise to the longest of the micro-batch.
        seq_length: most tokens of a row.
        gather: the collective in which ranks exchange rows; needed for several.

    Attributes:
        dropped: rows passed over, by reason, each row once (a later epoch passes over the same ones).
        noted: rows of which the tokens lack something, by what is lacking, each row once.
        examples: for each reason and lack, the place of the first such row, or its own error message.

    Raises:
        ConfigError: sizes that do not divide.
        DataError: fewer rows than a global batch.
    """

    def __init__(
        self,
        rows: Rows,
        encode: Encode,
        *,
        config: DataloaderConfig,
        global_batch_size: int,
        local_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        pad_token_id: int,
        supervise_padding: bool,
        seq_length: int | None = None,
        gather: Gather = lambda value: [value],
    ) -> None:
        if global_batch_size % (local_batch_size * world_size):
            raise ConfigError(
                f"step_scheduler.global_batch_size: {global_batch_size} is no multiple of local_batch_size "
                f"{local_batch_size} × {world_size} ranks"
            )
        if len(rows) < global_batch_size:
            raise DataError(
                f"dataset: {len(rows)} rows do not fill one global batch of {global_batch_size}; "
                "lower step_scheduler.global_batch_size or give more rows"
            )
        self.rows = rows
        self.encode = encode
        self.config = config
        self.global_batch_size = global_batch_size
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.supervise_padding = supervise_padding
        self.seq_length = seq_length
        self.gather = gather
        self.order = DataOrder(rows, seed, config.shuffle, config.group_by_length, global_batch_size)
        self.position = Position()
        self.dropped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch in which no row is passed over."""
        return len(self.rows) // self.global_batch_size

    def never_seen(self, total_steps: int) -> str | None:
        """Return a message on the rows that a run of so many steps never reaches; None if it shuffles or sees all."""
        rows, seen = len(self.rows), total_steps * self.global_batch_size
        if self.config.shuffle or seen >= rows:
            return None
        which = "" if self.config.group_by_length else f", from {self.rows.describe(seen)} on,"
        return (
            f"{rows - seen} of {rows} rows{which} are never seen: dataloader.shuffle is false, and {total_steps} steps "
            f"of {self.global_batch_size} rows end before them"
        )

    def __iter__(self) -> Generator[list[Batch]]:
        """Yield steps from the current position on, without end.

        Raises:
            DataError: a malformed row, or an epoch without a single full batch.
        """
        for batch in self._global_batches():
            self.position = batch.end
            for epoch, index, row in batch.passed_over:
                if epoch == 0:
                    count_dropped(index, row, self.rows, self.dropped, self.examples)
            if batch.end.epoch == 0:
                count_notes(batch.rows, self.rows, self.noted, self.examples)
            yield self._micro_batches(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step that was yielded, ready for JSON."""
        return {
            **self.position.as_dict(),
            "dropped": dict(self.dropped),
            "noted": dict(self.noted),
            "examples": dict(self.examples),
            "order": self.order.identity(),
        }

    def reconcile(self, state: Mapping[str, Any], accept_changed: bool) -> tuple[dict[str, Any], str | None]:
        """Return a saved state brought up to date with the data as they are now, and how they changed; None = not.

        Raises:
            DataError: rows that were trained on have changed, and `accept_changed` is False.
            ValueError, KeyError, TypeError, AttributeError: it is nothing that `state_dict` returned.
        """
        _check_state(state)
        return self.order.reconcile(state, accept_changed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next iteration starts there.

        Raises:
            DataError: the position belongs to another order: other data, seed, or grouping.
        """
        self.order.check_identity(state["order"])
        self.position = Position.from_dict(state)
        self.dropped = Counter(state["dropped"])
        self.noted = Counter(state.get("noted", {}))
        self.examples = dict(state["examples"])

    def _visits(self) -> Iterator[Visit]:
        """Yield the visits from the current position on, epoch after epoch."""
        epoch, cursor, begun = self.position.epoch, self.position.cursor, self.position.window
        while True:
            for first, window in self.order.windows(epoch, cursor, begun):
                for place in range(max(first, cursor), first + len(window)):
                    yield Visit(epoch, place, int(window[place - first]), window)
            epoch, cursor, begun = epoch + 1, 0, None

    def _global_batches(self) -> Iterator[_GlobalBatch]:
        """Yield global batches from the current position on, each of the next rows of the order that train."""
        epoch, start = self.position.epoch, self.position.cursor
        carried, visited = self.position.carried, self.position.visited
        encoded: list[tuple[int, EncodedRow]] = []
        passed_over: list[tuple[int, int, Dropped]] = []
        any_in_epoch = start > 0
        stream = encoded_together(
            self.encode, self._visits(), self.config.num_workers, 2 * self.global_batch_size,
            self.rank, self.gather, self.world_size,
        )  # fmt: skip
        for visit, row in stream:
            if visit.epoch == 0:
                visited = add_digests(visited, row.digest)
            arrived: list[tuple[int, EncodedRow | Dropped]] = []
            if visit.epoch != epoch:
                if not any_in_epoch:
                    raise DataError(self._no_batch(encoded, passed_over))
                left = [] if self.config.shuffle else [sample_id for sample_id, _ in encoded]
                epoch, start, encoded, any_in_epoch, carried = visit.epoch, 0, [], False, frozenset(left)
                arrived = [(sample_id, self.encode(sample_id, epoch)) for sample_id in left]
            if visit.index not in carried:  # those came first in this epoch already
                arrived.append((visit.index, row))
            for sample_id, one in arrived:
                if isinstance(one, Dropped):
                    passed_over.append((epoch, sample_id, one))
                else:
                    encoded.append((sample_id, one))
            if len(encoded) == self.global_batch_size:
                # Micro-batches of like length need less padding, and the longest comes first: if memory is too small
                # for it, that shows at once. The loss does not depend on this order.
                encoded.sort(key=lambda item: (-len(item[1]), item[0]))
                window = visit.window if isinstance(visit.window, list) else None
                end = Position(epoch, visit.place + 1, window, carried, visited)
                yield _GlobalBatch(encoded, start, end, passed_over)
                start, encoded, passed_over, any_in_epoch = visit.place + 1, [], [], True

    def _no_batch(self, encoded: Sequence[object], passed_over: Sequence[tuple[int, int, Dropped]]) -> str:
        reasons = Counter(row.reason for _, _, row in passed_over)
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return (
            f"dataset: a whole pass over {len(self.rows)} rows gives {len(encoded)} to train on, fewer than one "
            f"global batch of {self.global_batch_size} (dropped: {counted}); raise dataset.seq_length, lower "
            "step_scheduler.global_batch_size or give more rows"
        )

    def _micro_batches(self, batch: _GlobalBatch) -> list[Batch]:
        slots = generator(self.seed, "data/slots", batch.end.epoch, batch.start).permutation(len(batch.rows)).tolist()
        local, longest = self.local_batch_size, len(batch.rows[0][1])
        micro_batches = []
        # Ranks take turns within each micro-batch, so that all of them pad to about the same length.
        for first in range(self.rank * local, len(batch.rows), self.world_size * local):
            mine = batch.rows[first : first + local]
            beside = batch.rows[first - self.rank * local :][: self.world_size * local]
            micro_batches.append(
                collate(
                    [row for _, row in mine],
                    [sample_id for sample_id, _ in mine],
                    slots[first : first + local],
                    epoch=batch.end.epoch,
                    global_rows=self.global_batch_size,
                    length=longest if self.supervise_padding else rounded(len(mine[0][1]), self.seq_length),
                    pad_token_id=self.pad_token_id,
                    supervise_padding=self.supervise_padding,
                    peers=[sample_id for sample_id, _ in beside],
                )
            )
        return micro_batches


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise an error of Python where a state, read from a file, has not the shape that `state_dict` gives it."""
    order, counts = state["order"], [*state["dropped"].values(), *state.get("noted", {}).values()]
    places = [*(state.get("window") or ()), *state.get("carried", ())]
    if not all(type(number) is int and number >= 0 for number in (state["epoch"], state["cursor"], *places, *counts)):
        raise ValueError("a position is made of whole numbers")
    if state["cursor"] > order["rows"] or any(place >= order["rows"] for place in places):
        raise ValueError("a position lies within its rows")
    if not isinstance(order["fingerprint"], str) or not isinstance(state["examples"], dict):
        raise TypeError("examples are an object, and a fingerprint is text")
    int(state.get("visited", "0"), 16)
