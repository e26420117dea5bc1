"""Approximate caches: keys and values kept between forward passes, and passes over a part of the positions.

Where attention goes both ways, a token's keys and values, from the second layer on, depend on every other token, so
they are out of date as soon as one changes. A pass over a window that reads the others' from a store is therefore an
**approximation**, good as long as they have changed little since they were computed (Wu et al. 2025, Fast-dLLM,
arXiv 2505.22618, section 3.2). Prefix cache: the window is a block and all that follows it. Dual cache: only the block.

Shapes: B rows, L positions (column p of a row holds position p), G key/value heads, E head size, K rows of a window, S
its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.ops.padding import concat_padded


@dataclass(frozen=True)
class KeyValueStore:
    """Keys (after rotation) and values, (B, L, G, E) a layer; a window's pass writes into these tensors in place.

    Columns that nothing was written to hold zeros.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def empty(cls, config: Any, rows: int, columns: int, like: Tensor) -> KeyValueStore:
        """Return a store of zeros for a network of this configuration, in the dtype and on the device of `like`."""
        shape = (rows, columns, config.kv_heads, config.head_dim)
        keys, values = (tuple(like.new_zeros(shape) for _ in range(config.n_layers)) for _ in range(2))
        return cls(keys, values)

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def columns(self) -> int:
        return self.keys[0].shape[1]

    def select(self, rows: Sequence[int]) -> KeyValueStore:
        """Return a copy of some rows, in the order given."""
        rows_K = torch.tensor(rows, dtype=torch.long).to(self.keys[0].device)
        return self._each(lambda stored: stored.index_select(0, rows_K))

    def concat(self, more: KeyValueStore) -> KeyValueStore:
        """Return a copy with the rows of `more` behind these; the shorter of the two is padded on the right."""
        keys, values = (
            tuple(concat_padded(pair) for pair in zip(ours, theirs, strict=True))
            for ours, theirs in ((self.keys, more.keys), (self.values, more.values))
        )
        return KeyValueStore(keys, values)

    def padded(self, columns: int) -> KeyValueStore:
        """Return the store with room for rows of `columns` positions: itself, if it has that."""
        missing = columns - self.columns
        return self if missing <= 0 else self._each(lambda stored: F.pad(stored, (0, 0, 0, 0, 0, missing)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> KeyValueStore:
        return KeyValueStore(tuple(map(change, self.keys)), tuple(map(change, self.values)))


@dataclass(frozen=True)
class Window:
    """The positions of some rows that one pass computes anew; the network's `cache` for that pass.

    A row with fewer than S positions repeats its last one, which then computes, and writes, the same once more.
    """

    store: KeyValueStore
    columns: int  # of the store that are attended to
    whole: bool  # every position is computed, so that nothing is read from the store
    positions_KS: Tensor  # int64, of the queries
    rows_K: Tensor | None  # int64, rows of the store; None = all, in order
    lengths_K: Tensor | None  # int64, the columns that each row has; None = all of `columns`

    @classmethod
    def of(
        cls, store: KeyValueStore, positions_KS: Tensor, lengths: Sequence[int], rows: Sequence[int] | None = None
    ) -> Window:
        """Return the window of some positions, its tensors on the host: `positions_KS` are from `spans`.

        `rows` are those of the store, None = all, in order, and `lengths` the positions that each of them has.
        """
        columns, lengths_K = max(lengths), torch.tensor(lengths)
        ragged = min(lengths) < columns  # else no mask, which leaves SDPA its fast kernels
        return cls(
            store,
            columns,
            whole=not positions_KS[:, 0].any() and torch.equal(positions_KS[:, -1], lengths_K - 1),
            positions_KS=positions_KS,
            rows_K=None if rows is None else torch.tensor(rows),
            lengths_K=lengths_K if ragged else None,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What of a window may differ from another's that has the same `layout`."""
        return tuple(tensor for tensor in (self.positions_KS, self.rows_K, self.lengths_K) if tensor is not None)

    @property
    def mask_KL(self) -> Tensor | None:
        """The columns that each row has, bool; None = all of `columns`."""
        if self.lengths_K is None:
            return None
        return torch.arange(self.columns, device=self.lengths_K.device) < self.lengths_K[:, None]

    @property
    def layout(self) -> Hashable:
        """What windows of one store have in common that differ in the values of their `tensors` alone."""
        return self.whole, self.columns, self.rows_K is None, self.lengths_K is None

    def with_tensors(self, tensors: Sequence[Tensor]) -> Window:
        """Return a window that reads these, on the store's device, in place of its own: those of one of its layout."""
        given = iter(tensors)
        return replace(
            self,
            positions_KS=next(given),
            rows_K=None if self.rows_K is None else next(given),
            lengths_K=None if self.lengths_K is None else next(given),
        )

    def update(self, layer: int, k_BGLE: Tensor, v_BGLE: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (K, G, S, E) into the store; return those of all columns."""
        stored = (self.store.keys[layer], self.store.values[layer])
        rows_K = torch.arange(len(k_BGLE), device=k_BGLE.device) if self.rows_K is None else self.rows_K
        for whole_BLGE, new_KGSE in zip(stored, (k_BGLE, v_BGLE), strict=True):
            whole_BLGE[rows_K[:, None], self.positions_KS] = new_KGSE.transpose(1, 2).to(whole_BLGE.dtype)
        if self.whole:
            return k_BGLE, v_BGLE
        seen = (whole_BLGE[:, : self.columns].transpose(1, 2) for whole_BLGE in stored)
        keys, values = seen if self.rows_K is None else (tensor.index_select(0, self.rows_K) for tensor in seen)
        return keys, values


def spans(first_K: Tensor, end_K: Tensor) -> Tensor:
    """Return the positions first..end-1 of each row, int64 (K, S); a shorter row repeats its last one."""
    return torch.minimum(first_K[:, None] + torch.arange(int((end_K - first_K).max())), end_K[:, None] - 1)


@torch.no_grad()
def forward_window(model: Callable[..., Tensor], input_ids: Tensor, window: Window) -> Tensor:
    """Run the network over the tokens (K, S) at a window's positions alone, all others as its store has them.

    A window of all positions is the network's forward pass, and fills the store. With any other the result is an
    approximation, unless the store's keys and values are those of the very tokens that now stand at the others.
    """
    return model(input_ids, window.mask_KL, window.positions_KS, window)
