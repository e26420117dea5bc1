"""The order in which an epoch visits rows: the source's or a random one, rows of like length together or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unmask.rng import generator

Window = list[int] | np.ndarray  # row indices in their order; a list with grouping
GROUP_BATCHES = 64  # global batches a window: long enough to find rows of one length, short enough to stay random


def source_order(rows: int, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return the row indices of an epoch in the order that the source or the seed gives them."""
    return generator(seed, "data/order", epoch).permutation(rows) if shuffle else np.arange(rows)


def epoch_windows(
    rows: int,
    epoch: int,
    seed: int,
    *,
    shuffle: bool,
    batch_rows: int,
    text_length: Callable[[int], int] | None = None,
    start: int = 0,
    begun: Sequence[int] | None = None,
) -> Iterator[tuple[int, Window]]:
    """Yield the order of an epoch by stretches: (place of the first row, row indices), from the one with `start` on.

    Each row of 0..rows-1 has one place. Without `shuffle` that is the order of the source. With `text_length`, a row's
    length in any unit, each window of 64 global batches is sorted by length (ties by index), cut into global batches,
    and these are put in random order; an incomplete one stays last. Only the windows that are reached are measured, so
    it costs nothing ahead, whatever the source. Without it, the whole epoch is one stretch.

    Args:
        begun: the order of the first window, if it was reached before. Measured again it might be another: a row in it
            that was mended since has another length.
    """
    order = source_order(rows, epoch, seed, shuffle)
    if text_length is None:
        yield 0, order
        return
    window_rows = GROUP_BATCHES * batch_rows
    for window in range(start // window_rows, -(-rows // window_rows)):
        first = window * window_rows
        indices = order[first:][:window_rows]
        known = dict.fromkeys(begun or ())
        if known and known.keys() <= set(indices.tolist()):
            yield first, list(dict.fromkeys([*known, *indices.tolist()]))
        else:
            yield first, _grouped(indices, seed, epoch, window, batch_rows, text_length).tolist()
        begun = None


def _grouped(
    indices: np.ndarray, seed: int, epoch: int, window: int, batch_rows: int, text_length: Callable[[int], int]
) -> np.ndarray:
    lengths = np.fromiter((text_length(int(index)) for index in indices), dtype=np.int64, count=len(indices))
    indices = indices[np.lexsort((indices, lengths))]
    whole = len(indices) // batch_rows
    batches = indices[: whole * batch_rows].reshape(whole, batch_rows)
    shuffled = generator(seed, "data/windows", epoch, window).permutation(batches)
    return np.concatenate([shuffled.reshape(-1), indices[whole * batch_rows :]])
