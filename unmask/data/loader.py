"""The training loader: an endless stream of global batches, whose position is a few numbers.

Every rank composes the same global batch and takes its own rows from it; which rows it holds depends on the seed, the
epoch and the position, never on ranks, micro-batches or workers. A row that gives nothing to train on is passed over
and the next one of the order takes its place. Rows at the end of an epoch that do not fill a batch are left out of it;
without shuffling they would be the same ones each time, so there they come first in the next epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.batch import Batch
from unmask.config.data import DataloaderConfig
from unmask.data.batches import collate, rounded
from unmask.data.encode import Dropped, Encode, EncodedRow, Visit, count_notes, encoded_ahead
from unmask.data.order import Window, epoch_windows, source_order
from unmask.data.sources import Rows
from unmask.data.visited import MODULUS, rows_digest
from unmask.errors import ConfigError, DataError
from unmask.rng import generator


@dataclass(frozen=True)
class _GlobalBatch:
    """One step's rows, before they are divided among ranks and micro-batches.

    Attributes:
        rows: (sample id, tokens) of each, the longest first.
        start: place in the epoch's order at which the search for its rows began.
        end: place after its last row.
        window: the stretch of the order that its last row stands in (`epoch_windows`); None without grouping.
        carried: rows that the epoch before had left over and that came first in this one.
        visited: digest of all rows of the first epoch up to here (`visited.rows_digest`).
        passed_over: (epoch, sample id, reason) of the rows passed over since the batch before it, an ended epoch's
            included.
    """

    rows: list[tuple[int, EncodedRow]]
    epoch: int
    start: int
    end: int
    window: list[int] | None
    carried: frozenset[int]
    visited: int
    passed_over: list[tuple[int, int, Dropped]]


class TrainLoader:
    """Iterates over steps; each is the list of this rank's micro-batches of one global batch.

    Args:
        encode: gives a row as an epoch sees it, as tokens; must pickle if there are workers.
        global_batch_size: rows a step, over all ranks and micro-batches.
        local_batch_size: rows a micro-batch.
        seed: of the order and of the slots.
        pad_token_id: padding; EOS where it is supervised.
        supervise_padding: padding is attended and supervised. Rows are then padded to the longest of their global
            batch, so that the loss does not depend on how it is divided; otherwise to the longest of the micro-batch.
        seq_length: most tokens of a row.

    Attributes:
        dropped: rows passed over, by reason, each row once (a later epoch passes over the same ones).
        noted: rows that train without something they say, by what that is, each row once.
        examples: for each reason, the first such row: its place, or what was wrong with it where that differs.

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
        self.epoch = 0
        self.cursor = 0
        self.window: list[int] | None = None
        self.carried: frozenset[int] = frozenset()
        self.visited = 0
        self.dropped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch in which no row is passed over."""
        return len(self.rows) // self.global_batch_size

    def never_seen(self, total_steps: int) -> str | None:
        """Say which rows a run of so many steps ends before; None where a random order chooses them, or none are."""
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
            self.epoch, self.cursor, self.window = batch.epoch, batch.end, batch.window
            self.carried, self.visited = batch.carried, batch.visited
            for epoch, index, row in batch.passed_over:
                if epoch == 0:
                    self.dropped[row.reason] += 1
                    self.examples.setdefault(row.reason, row.detail or self.rows.describe(index))
            if batch.epoch == 0:
                count_notes(batch.rows, self.rows, self.noted, self.examples)
            yield self._micro_batches(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step that was yielded, ready for JSON."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "window": self.window,
            "carried": sorted(self.carried),
            "visited": f"{self.visited:016x}",
            "dropped": dict(self.dropped),
            "noted": dict(self.noted),
            "examples": dict(self.examples),
            "order": self._order_identity(),
        }

    def fit(self, state: Mapping[str, Any], accept_changed: bool) -> tuple[dict[str, Any], str | None]:
        """Return a position in the data as they are now, and how they have changed since it was saved.

        Rows to come may be others than they were, rows that were trained on may not.

        Args:
            state: what `state_dict` returned.
            accept_changed: rows that were trained on may, too.

        Raises:
            DataError: rows that were trained on have changed, and that is not accepted.
        """
        order, before = self._order_identity(), state["order"]
        same_data = all(before[name] == order[name] for name in ("fingerprint", "rows"))
        if same_data and "visited" in state:
            return dict(state), None
        visited = f"{rows_digest(self.rows, self._behind(state)):016x}"
        note = None if same_data else "the data, but none of the rows trained on so far"
        if not same_data and state.get("visited") != visited:
            if not accept_changed:
                counts = (
                    "" if before["rows"] == order["rows"] else f" ({before['rows']} rows then, {order['rows']} now)"
                )
                raise DataError(f"rows that it was trained on are no longer the same{counts}")
            note = "rows that were trained on; checkpoint.accept_changed_data goes on with them as they are"
        renewed = {name: order[name] for name in ("fingerprint", "rows")}
        return {**state, "visited": visited, "order": {**before, **renewed}}, note

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next iteration starts there.

        Raises:
            DataError: the position belongs to another order: other data, seed, or grouping.
        """
        for key, ours in self._order_identity().items():
            theirs = state["order"].get(key)
            if theirs != ours:
                raise DataError(
                    f"dataset: the checkpoint's data position does not fit this run, {key} was {theirs} and is {ours}; "
                    "resume with the data and settings it was made with, or start in a new checkpoint_dir"
                )
        self.epoch, self.cursor, self.window = state["epoch"], state["cursor"], state.get("window")
        self.carried, self.visited = frozenset(state.get("carried", ())), int(state["visited"], 16)
        self.dropped = Counter(state["dropped"])
        self.noted = Counter(state.get("noted", {}))
        self.examples = dict(state["examples"])

    def _order_identity(self) -> dict[str, Any]:
        """Return all that the order of rows depends on."""
        return {
            "fingerprint": self.rows.fingerprint,
            "rows": len(self.rows),
            "seed": self.seed,
            "shuffle": self.config.shuffle,
            # Windows are counted in global batches; without grouping the batch size does not touch the order.
            "grouped_by_batches_of": self.global_batch_size if self.config.group_by_length else None,
        }

    def _behind(self, state: Mapping[str, Any]) -> Iterable[int]:
        """Return the rows of the first epoch that lie behind a position, dropped ones among them."""
        if state["epoch"] > 0:
            return range(len(self.rows))
        cursor = state["cursor"]
        first, window = next(self._windows(0, cursor, state.get("window")), (cursor, []))
        return [*source_order(len(self.rows), 0, self.seed, self.config.shuffle)[:first], *window[: cursor - first]]

    def _windows(self, epoch: int, cursor: int, begun: Sequence[int] | None) -> Iterator[tuple[int, Window]]:
        return epoch_windows(
            len(self.rows),
            epoch,
            self.seed,
            shuffle=self.config.shuffle,
            batch_rows=self.global_batch_size,
            text_length=self.rows.text_length if self.config.group_by_length else None,
            start=cursor,
            begun=begun,
        )

    def _visits(self) -> Iterator[Visit]:
        """Yield the visits from the current position on, epoch after epoch."""
        epoch, cursor, begun = self.epoch, self.cursor, self.window
        while True:
            for first, window in self._windows(epoch, cursor, begun):
                for place in range(max(first, cursor), first + len(window)):
                    yield Visit(epoch, place, int(window[place - first]), window)
            epoch, cursor, begun = epoch + 1, 0, None

    def _global_batches(self) -> Iterator[_GlobalBatch]:
        epoch, start, carried, digest = self.epoch, self.cursor, self.carried, self.visited
        encoded: list[tuple[int, EncodedRow]] = []
        passed_over: list[tuple[int, int, Dropped]] = []
        any_in_epoch = start > 0
        stream = encoded_ahead(self.encode, self._visits(), self.config.num_workers, 2 * self.global_batch_size)
        for visit, row in stream:
            if visit.epoch == 0:
                digest = (digest + row.digest) % MODULUS
            first: list[tuple[int, EncodedRow | Dropped]] = []
            if visit.epoch != epoch:
                if not any_in_epoch:
                    raise DataError(self._no_batch(encoded, passed_over))
                left = [] if self.config.shuffle else [sample_id for sample_id, _ in encoded]
                epoch, start, encoded, any_in_epoch, carried = visit.epoch, 0, [], False, frozenset(left)
                first = [(sample_id, self.encode(sample_id, epoch)) for sample_id in left]
            for sample_id, one in first if visit.index in carried else [*first, (visit.index, row)]:
                if isinstance(one, Dropped):
                    passed_over.append((epoch, sample_id, one))
                else:
                    encoded.append((sample_id, one))
            if len(encoded) == self.global_batch_size:
                # Micro-batches of like length need less padding, and the longest comes first: if memory is too small
                # for it, that shows at once. The loss does not depend on this order.
                encoded.sort(key=lambda item: (-len(item[1]), item[0]))
                begun = visit.window if isinstance(visit.window, list) else None
                yield _GlobalBatch(encoded, epoch, start, visit.place + 1, begun, carried, digest, passed_over)
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
        slots = generator(self.seed, "data/slots", batch.epoch, batch.start).permutation(len(batch.rows)).tolist()
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
                    epoch=batch.epoch,
                    global_rows=self.global_batch_size,
                    length=longest if self.supervise_padding else rounded(len(mine[0][1]), self.seq_length),
                    pad_token_id=self.pad_token_id,
                    supervise_padding=self.supervise_padding,
                    peers=[sample_id for sample_id, _ in beside],
                )
            )
        return micro_batches
