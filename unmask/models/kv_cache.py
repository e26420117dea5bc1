"""Keys and values of a batch's tokens, kept between forward passes in memory that they are written into in place.

Room is taken ahead of need, so that addresses and shapes rarely change: kernels that were recorded for them stay valid,
and what is there is not copied when tokens are added.

Shapes: B rows, C columns (column p of a row holds its position p), G key/value heads, E head size (both may differ from
layer to layer); K rows and S columns, some of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class KeyValueStore:
    """Room for keys (after rotation) and values, (B, G, C, E) a layer; how much of it a row uses, its user knows.

    Unused columns hold finite numbers, which a mask has to hide.

    Attributes:
        keys, values: a tensor a layer.
        addresses: stands for where they lie: another object once they lie elsewhere.
    """

    def __init__(self, keys: Iterable[Tensor], values: Iterable[Tensor]) -> None:
        self.keys, self.values = list(keys), list(values)
        self.addresses = object()

    @classmethod
    def empty(cls, heads: Sequence[tuple[int, int]], rows: int, columns: int, like: Tensor) -> KeyValueStore:
        """Return a store of zeros, in the dtype and on the device of `like`; `heads`: G and E of each layer."""
        keys, values = ([like.new_zeros(rows, count, columns, size) for count, size in heads] for _ in range(2))
        return cls(keys, values)

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]

    def reserve(self, rows: int, columns: int, multiple: int = 1) -> None:
        """Make room: in new memory, of a multiple of so many columns, if there is too little, else nothing changes."""
        rows, more_columns = max(rows, self.rows), max(columns, self.columns)
        if (rows, more_columns) == (self.rows, self.columns):
            return
        if columns > self.columns:
            more_columns = -(-columns // multiple) * multiple
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one after the other: the old memory is given back on the way
                tensors[layer] = old.new_zeros(rows, old.shape[1], more_columns, old.shape[3])
                tensors[layer][: old.shape[0], :, : old.shape[2]] = old
        self.addresses = object()

    def write(self, layer: int, rows_K: Tensor | None, positions_KS: Tensor, k_KGSE: Tensor, v_KGSE: Tensor) -> None:
        """Write a layer's keys and values at some positions of some rows, None = the first K in order."""
        write(self.keys[layer], rows_K, positions_KS, k_KGSE)
        write(self.values[layer], rows_K, positions_KS, v_KGSE)

    def put(self, first: int, more: KeyValueStore, rows: int, columns: int) -> None:
        """Copy the first rows, as far as there are, and columns of another store to the rows from `first` on."""
        for stored, new in ((self.keys, more.keys), (self.values, more.values)):
            for stored_BGCE, new_BGCE in zip(stored, new, strict=True):
                part_KGSE = new_BGCE[:rows, :, :columns]
                stored_BGCE[first : first + len(part_KGSE), :, :columns] = part_KGSE

    def keep(self, rows_K: Tensor, columns: int) -> None:
        """Move some rows (int64, on the device) to the front, in this order; of each its first columns."""
        for tensors in (self.keys, self.values):
            for stored_BGCE in tensors:
                stored_BGCE[: len(rows_K), :, :columns] = stored_BGCE[:, :, :columns].index_select(0, rows_K)


def write(stored_BGCE: Tensor, rows_K: Tensor | None, positions_KS: Tensor, new_KGSE: Tensor) -> None:
    """Write a layer's keys, or values, into its room; arguments as in `KeyValueStore.write`."""
    if rows_K is None:
        rows_K = torch.arange(len(new_KGSE), device=new_KGSE.device)
    stored_BGCE.transpose(1, 2)[rows_K[:, None], positions_KS] = new_KGSE.transpose(1, 2).to(stored_BGCE.dtype)
