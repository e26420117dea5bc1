"""Keys and values of a row's positions, kept between forwards: the store of LLaDA's approximate caches.

LLaDA is bidirectional: a token's keys and values, from the second layer on, depend on every other token, so they are
out of date as soon as one changes. A forward over a window that reads the others' from a store is therefore an
**approximation**, good as long as they have changed little since they were computed (Wu et al. 2025, Fast-dLLM,
arXiv 2505.22618, section 3.2). Prefix cache: the window is a block and all that follows it. Dual cache: only the block.

Shapes: B rows, G key/value heads, L columns (position p of a row is in column p), E head size, S window width, K rows
of a window, N its real positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Kinds of device on which a copy a row is several times faster than one copy by index; elsewhere launches count.
ROW_BY_ROW = ("cpu",)


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
        self._store = store
        self.device = store.keys[0].device
        self.columns = max(lengths)
        self.width = max(e - f for f, e in zip(first, end, strict=True))
        self._first_K = torch.tensor(first)
        self._rows_K = None if rows is None else torch.tensor(rows, device=self.device)
        # Every position is computed, so nothing is read from the store. What is written behind a row's length nobody
        # reads, so one span serves rows of any length.
        self.whole = not any(first) and tuple(end) == tuple(lengths)
        same = len(set(first)) == 1 and len(set(end)) == 1
        self._span = slice(first[0], first[0] + self.width) if self.whole or same else None
        self._pieces = None
        if self._span is None and self.device.type in ROW_BY_ROW:
            stored = range(len(first)) if rows is None else rows
            self._pieces = list(zip(stored, first, end, strict=True))
        elif self._span is None:
            real_KS = torch.arange(self.width) < (torch.tensor(end) - self._first_K)[:, None]
            row_N, column_N = (index.to(self.device) for index in real_KS.nonzero(as_tuple=True))
            self._query_N = (row_N, column_N)
            self._place_N = (
                row_N if self._rows_K is None else self._rows_K[row_N],
                self._first_K.to(self.device)[row_N] + column_N,
            )
        lengths_K = torch.tensor(lengths)
        equal = int(lengths_K.min()) == self.columns
        keep_KL = None if equal else (torch.arange(self.columns) < lengths_K[:, None]).to(self.device)
        # bool (K, 1, 1, columns), True = attend; None where nothing is padding, which keeps the fast kernels.
        self.mask = None if keep_KL is None else keep_KL[:, None, None, :]
        starts = self._first_K if self._span is None else self._first_K[:1]
        # Position of each query, int64 (K, S); (1, S) where all rows have the same. Padding counts on.
        self.positions_KS = (starts[:, None] + torch.arange(self.width)).to(self.device)

    def exchange(self, layer: int, k_KGSE: Tensor, v_KGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values into the store; return those of all positions, (K, G, columns, E)."""
        stored = (self._store.keys[layer], self._store.values[layer])
        for whole_BGLE, new_KGSE in zip(stored, (k_KGSE, v_KGSE), strict=True):
            self._write(whole_BGLE, new_KGSE.to(whole_BGLE.dtype))
        if self.whole:
            return k_KGSE, v_KGSE
        keys, values = (whole_BGLE[:, :, : self.columns] for whole_BGLE in stored)
        if self._rows_K is None:
            return keys, values
        return keys.index_select(0, self._rows_K), values.index_select(0, self._rows_K)

    def _write(self, whole_BGLE: Tensor, new_KGSE: Tensor) -> None:
        if self._pieces is not None:
            for (row, first, end), new_GSE in zip(self._pieces, new_KGSE, strict=True):
                whole_BGLE[row, :, first:end] = new_GSE[:, : end - first]
        elif self._span is None:
            by_place = whole_BGLE.transpose(1, 2)
            by_place[self._place_N] = new_KGSE.transpose(1, 2)[self._query_N]
        elif self._rows_K is None:
            whole_BGLE[:, :, self._span] = new_KGSE
        else:
            whole_BGLE[:, :, self._span].index_copy_(0, self._rows_K, new_KGSE)
