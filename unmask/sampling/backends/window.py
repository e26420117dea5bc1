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

import torch
from torch import Tensor

from unmask.models.kv_cache import KeyValueStore, write


@dataclass(frozen=True)
class Window:
    """The positions of some rows that one pass computes anew; the network's `cache` for that pass.

    A row with fewer than S positions repeats its last one, which then computes, and writes, the same once more.
    """

    store: KeyValueStore
    columns: int  # that are attended to
    whole: bool  # every position is computed, so that nothing is read from the store
    positions_KS: Tensor  # int64, of the queries
    rows_K: Tensor | None  # int64, rows of the store; None = the first ones, in order
    lengths_K: Tensor | None  # int64, the columns that each row has; None = all of `columns`

    @classmethod
    def of(
        cls,
        store: KeyValueStore,
        positions_KS: Tensor,
        lengths: Sequence[int],
        rows: Sequence[int] | None = None,
        columns: int | None = None,
    ) -> Window:
        """Return the window of some positions, its tensors on the host: `positions_KS` are from `spans`.

        Args:
            store: what is read and written; has the columns.
            positions_KS: those to compute.
            lengths: positions that each row has.
            rows: of the store; None = the first ones, in order.
            columns: how many are attended to; None = those of the longest row. More make windows more alike.
        """
        lengths_K = torch.tensor(lengths)
        whole = not positions_KS[:, 0].any() and torch.equal(positions_KS[:, -1], lengths_K - 1)
        columns = positions_KS.shape[1] if whole else columns or max(lengths)
        ragged = min(lengths) < columns  # else no mask, which leaves SDPA its fast kernels
        return cls(
            store,
            columns,
            whole=whole,
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

    def layer(self, number: int) -> LayerWindow:
        """Return what one layer reads and writes."""
        return LayerWindow(self, self.store.keys[number], self.store.values[number])


@dataclass(frozen=True)
class LayerWindow:
    """A window in one layer's keys and values (B, G, C, E); a compiled block takes that of any layer."""

    window: Window
    keys: Tensor
    values: Tensor

    def update(self, k_KGSE: Tensor, v_KGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the layer's new keys and values; return those of all columns."""
        window = self.window
        write(self.keys, window.rows_K, window.positions_KS, k_KGSE)
        write(self.values, window.rows_K, window.positions_KS, v_KGSE)
        if window.whole:
            return k_KGSE, v_KGSE
        keys, values = self.keys[:, :, : window.columns], self.values[:, :, : window.columns]
        if window.rows_K is None:
            return keys[: len(k_KGSE)], values[: len(k_KGSE)]
        return keys.index_select(0, window.rows_K), values.index_select(0, window.rows_K)


def spans(first_K: Tensor, end_K: Tensor, width: int | None = None) -> Tensor:
    """Return the positions first..end-1 of each row, int64 (K, S); a shorter row repeats its last one.

    S is the width; None = that of the longest.
    """
    width = int((end_K - first_K).max()) if width is None else width
    return torch.minimum(first_K[:, None] + torch.arange(width), end_K[:, None] - 1)


@torch.no_grad()
def forward_window(model: Callable[..., Tensor], input_ids: Tensor, window: Window) -> Tensor:
    """Run the network over the tokens (K, S) at a window's positions alone, all others as its store has them.

    A window of all positions is the network's forward pass, and fills the store. With any other the result is an
    approximation, unless the store's keys and values are those of the very tokens that now stand at the others.
    """
    return model(input_ids, window.mask_KL, window.positions_KS, window)
