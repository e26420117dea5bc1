"""Keys and values of a row's positions, kept between forwards: the store of LLaDA's approximate caches.

LLaDA is bidirectional: a token's keys and values, from the second layer on, depend on every other token, so they are
out of date as soon as one changes. A forward over a window that reads the others' from a store is therefore an
**approximation**, good as long as they have changed little since they were computed (Wu et al. 2025, Fast-dLLM,
arXiv 2505.22618, section 3.2). Prefix cache: the window is a block and all that follows it. Dual cache: only the block.

Shapes: B rows, G key/value heads, L columns (position p of a row is in column p), E head size, S window width, K rows
of a window, N its real positions.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.models.key_runs import KeyRun, key_runs

# Kinds of device on which slices are written several times faster than by index; elsewhere launches count.
BY_SLICE = ("cpu",)


@dataclass(frozen=True)
class KeyValueStore:
    """Keys (after rotation) and values of every layer. A window's forward writes into these tensors in place.

    Attributes:
        keys, values: one (B, G, L, E) a layer. Columns that nothing was written to hold zeros.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def zeros(cls, layers: int, shape: tuple[int, int, int, int], like: Tensor) -> KeyValueStore:
        """Return an empty store of `shape` (B, G, L, E) a layer, in the dtype and on the device of `like`."""
        return cls(
            tuple(like.new_zeros(shape) for _ in range(layers)), tuple(like.new_zeros(shape) for _ in range(layers))
        )

    @property
    def rows(self) -> int:
        """B."""
        return self.keys[0].shape[0]

    @property
    def columns(self) -> int:
        """L, the longest row that has room."""
        return self.keys[0].shape[2]

    def take(self, rows: Sequence[int]) -> KeyValueStore:
        """Return a copy of some rows, in the order given."""
        rows_K = torch.tensor(rows, dtype=torch.long, device=self.keys[0].device)
        return KeyValueStore(
            tuple(keys.index_select(0, rows_K) for keys in self.keys),
            tuple(values.index_select(0, rows_K) for values in self.values),
        )

    def join(self, more: KeyValueStore) -> KeyValueStore:
        """Return a copy with the rows of `more` behind these; the shorter of the two is padded on the right."""
        columns = max(self.columns, more.columns)
        pairs = zip((*self.keys, *self.values), (*more.keys, *more.values), strict=True)
        joined = tuple(torch.cat((_widen(old, columns), _widen(new, columns))) for old, new in pairs)
        return KeyValueStore(joined[: len(self.keys)], joined[len(self.keys) :])

    def widened(self, columns: int) -> KeyValueStore:
        """Return the store with room for rows of `columns` positions: itself, if it has that."""
        if columns <= self.columns:
            return self
        return KeyValueStore(
            tuple(_widen(keys, columns) for keys in self.keys), tuple(_widen(values, columns) for values in self.values)
        )


def _widen(old_BGLE: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(old_BGLE, (0, 0, 0, columns - old_BGLE.shape[2]))


class Window:
    """The positions [first, end) of some rows of a store that one forward computes anew.

    Queries are right-padded to the widest window: what is behind a row's own end is computed and used by nobody.

    Args:
        store: what is read and written.
        first, end: a window a row; 0 ≤ first < end ≤ length.
        lengths: positions that each row has; those from there on are never attended to.
        rows: the rows of the store; None = all, in order.
    """

    def __init__(
        self,
        store: KeyValueStore,
        first: Sequence[int],
        end: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> None:
        self._store, self._lengths = store, tuple(lengths)
        device = store.keys[0].device
        self.columns = max(lengths)
        self.width = max(e - f for f, e in zip(first, end, strict=True))
        # Every position is computed, so nothing is read from the store. What is written behind a row's length nobody
        # reads, so one span serves rows of any length.
        self.whole = not any(first) and tuple(end) == tuple(lengths)
        same = self.whole or (len(set(first)) == 1 and len(set(end)) == 1)
        first_K, lengths_K = torch.tensor(first), torch.tensor(lengths)
        starts = first_K[:1] if same else first_K
        # Position of each query, (1, S) where all rows have the same; padding counts on.
        tensors = {"positions": starts[:, None] + torch.arange(self.width)}
        if rows is not None:
            tensors["rows"] = torch.tensor(rows)
        self._pieces, self._runs = None, None
        if device.type in BY_SLICE:
            self._runs = key_runs(lengths)
            spans = zip(range(len(first)) if rows is None else rows, first, end, strict=True)
            self._pieces = (
                [(slice(None), first[0], self.width)]
                if same and rows is None
                else [(slice(row, row + 1), start, stop - start) for row, start, stop in spans]
            )
        elif not same or rows is not None:
            real_KS = torch.arange(self.width) < (torch.tensor(end) - first_K)[:, None]
            row_N, tensors["query_column"] = real_KS.nonzero(as_tuple=True)
            tensors["query_row"] = row_N
            tensors["row"] = row_N if rows is None else tensors["rows"][row_N]
            tensors["column"] = first_K[row_N] + tensors["query_column"]
        if self._runs is None and int(lengths_K.min()) < self.columns:  # else nothing is padding: the fast kernels
            tensors["mask"] = (torch.arange(self.columns) < lengths_K[:, None])[:, None, None, :]
        self.tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What windows of one store have in common that differ in the values of their tensors alone."""
        pieces = None if self._pieces is None else tuple((rows.start, *span) for rows, *span in self._pieces)
        runs = None if self._runs is None else self._lengths
        return self.whole, self.columns, self.width, pieces, runs, *self.tensors

    def reading(self, tensors: Sequence[Tensor]) -> Window:
        """Return a window of this kind that reads these tensors instead of its own, given in their order."""
        other = copy.copy(self)
        other.tensors = dict(zip(self.tensors, tensors, strict=True))
        return other

    @property
    def positions_KS(self) -> Tensor:
        """Position of each query, int64 (K, S), or (1, S) where all rows have the same."""
        return self.tensors["positions"]

    @property
    def mask(self) -> Tensor | tuple[KeyRun, ...] | None:
        """Which columns are attended to, bool (K, 1, 1, columns), or as runs of rows; None = all."""
        if self._runs is None:
            return self.tensors.get("mask")
        (first, *others) = self._runs
        return self._runs if others else first.mask

    def exchange(self, layer: int, k_KGSE: Tensor, v_KGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values into the store; return those of all positions, (K, G, columns, E)."""
        stored = (self._store.keys[layer], self._store.values[layer])
        for whole_BGLE, new_KGSE in zip(stored, (k_KGSE, v_KGSE), strict=True):
            self._write(whole_BGLE, new_KGSE.to(whole_BGLE.dtype))
        if self.whole:
            return k_KGSE, v_KGSE
        keys, values = (whole_BGLE[:, :, : self.columns] for whole_BGLE in stored)
        rows_K = self.tensors.get("rows")
        return (keys, values) if rows_K is None else (keys.index_select(0, rows_K), values.index_select(0, rows_K))

    def _write(self, whole_BGLE: Tensor, new_KGSE: Tensor) -> None:
        if self._pieces is not None:
            parts = [new_KGSE] if len(self._pieces) == 1 else new_KGSE.split(1)
            for (rows, first, width), new_kGSE in zip(self._pieces, parts, strict=True):
                whole_BGLE[rows, :, first : first + width] = new_kGSE[:, :, :width]
        elif "row" in self.tensors:
            row_N, column_N = self.tensors["row"], self.tensors["column"]
            query_N = (self.tensors["query_row"], self.tensors["query_column"])
            whole_BGLE.transpose(1, 2)[row_N, column_N] = new_KGSE.transpose(1, 2)[query_N]
        else:
            whole_BGLE.index_copy_(2, self.positions_KS[0], new_KGSE)
