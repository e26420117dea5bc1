"""A training run's position in its data, as checkpoints hold it, and whether the data still fit it at a resume.

Rows that were trained on must be what they were, rows to come may differ. The rows trained on are compared by a digest:
the sum of a hash of each row as read, modulo 2⁶⁴. It can be updated row by row, and depends neither on the order of the
rows nor on the file and format that they stand in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from unmask.data.conversation import Conversation
from unmask.data.order import Window, epoch_windows, source_order
from unmask.data.sources import Rows
from unmask.errors import DataError

_MODULUS = 2**64


def row_digest(conversation: Conversation) -> int:
    """Return the hash of a row, below 2⁶⁴; keys that nothing reads do not count."""
    turns = [replace(turn, unread=()) for turn in conversation.messages]
    content = repr((conversation.tools, turns)).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def add_digests(*digests: int) -> int:
    """Return the digest of several rows together."""
    return sum(digests) % _MODULUS


def rows_digest(rows: Rows, indices: Iterable[int]) -> int:
    """Return the digest of some rows; one that cannot be read counts 0, as when training left it out."""
    total = 0
    for index in indices:
        try:
            total = add_digests(total, row_digest(rows[int(index)]))
        except DataError:
            continue
    return total


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data after a step.

    Attributes:
        epoch: from 0.
        cursor: the next place in the epoch's order.
        window: the window of the order that the last row stands in (`epoch_windows`); None without grouping by length.
        carried: rows that the epoch before had left over and that came first in this one.
        visited: digest of all rows of the first epoch up to here.
    """

    epoch: int = 0
    cursor: int = 0
    window: Sequence[int] | None = None
    carried: frozenset[int] = frozenset()
    visited: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the position as JSON has it."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "window": self.window,
            "carried": sorted(self.carried),
            "visited": f"{self.visited:016x}",
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Position:
        """Read what `as_dict` wrote, among other entries of a loader's state."""
        carried, visited = frozenset(state.get("carried", ())), int(state["visited"], 16)
        return cls(state["epoch"], state["cursor"], state.get("window"), carried, visited)


@dataclass(frozen=True)
class DataOrder:
    """The order of a source's rows in every epoch, and all that it depends on."""

    rows: Rows
    seed: int
    shuffle: bool
    group_by_length: bool
    global_batch_size: int

    def identity(self) -> dict[str, Any]:
        """Return all that the order depends on, for JSON."""
        return {
            "fingerprint": self.rows.fingerprint,
            "rows": len(self.rows),
            "seed": self.seed,
            "shuffle": self.shuffle,
            # Windows are counted in global batches; without grouping the batch size does not touch the order.
            "grouped_by_batches_of": self.global_batch_size if self.group_by_length else None,
        }

    def windows(self, epoch: int, cursor: int, begun: Sequence[int] | None) -> Iterator[tuple[int, Window]]:
        """Yield (place of the first row, row indices) for each window of an epoch from the one with `cursor` on."""
        return epoch_windows(
            len(self.rows),
            epoch,
            self.seed,
            shuffle=self.shuffle,
            batch_rows=self.global_batch_size,
            text_length=self.rows.text_length if self.group_by_length else None,
            start=cursor,
            begun=begun,
        )

    def check_identity(self, stored: Mapping[str, Any]) -> None:
        """Raise DataError if a position with this stored identity belongs to another order."""
        for key, ours in self.identity().items():
            theirs = stored.get(key)
            if theirs != ours:
                raise DataError(
                    f"dataset: the checkpoint's data position does not fit this run, {key} was {theirs} and is {ours}; "
                    "resume with the data and settings it was made with, or start in a new checkpoint_dir"
                )

    def reconcile(self, state: Mapping[str, Any], accept_changed: bool) -> tuple[dict[str, Any], str | None]:
        """Return a loader's state brought up to date with the data as they are now, and how they changed; None = not.

        Args:
            state: a position and, under "order", the identity of its order.
            accept_changed: rows that were trained on may have changed.

        Raises:
            DataError: rows that were trained on have changed, and that is not accepted.
        """
        now, before = self.identity(), state["order"]
        same_data = all(before[name] == now[name] for name in ("fingerprint", "rows"))
        if same_data and "visited" in state:
            return dict(state), None
        visited = f"{rows_digest(self.rows, self._rows_before(state)):016x}"
        note = None if same_data else "the data, but none of the rows trained on so far"
        if not same_data and state.get("visited") != visited:
            if not accept_changed:
                counts = "" if before["rows"] == now["rows"] else f" ({before['rows']} rows then, {now['rows']} now)"
                raise DataError(f"rows that it was trained on are no longer the same{counts}")
            note = "rows that were trained on; checkpoint.accept_changed_data goes on with them as they are"
        renewed = {name: now[name] for name in ("fingerprint", "rows")}
        return {**state, "visited": visited, "order": {**before, **renewed}}, note

    def _rows_before(self, state: Mapping[str, Any]) -> Iterable[int]:
        """Return the rows of the first epoch that come before a position, dropped ones among them."""
        if state["epoch"] > 0:
            return range(len(self.rows))
        cursor = state["cursor"]
        first, window = next(self.windows(0, cursor, state.get("window")), (cursor, []))
        return [*source_order(len(self.rows), 0, self.seed, self.shuffle)[:first], *window[: cursor - first]]
