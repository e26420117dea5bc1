"""The order in which an epoch visits its rows: a function of the seed and the epoch, of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from unmask.rng import generator

GROUP_BATCHES = 64  # global batches a window: long enough to find rows of one length, short enough to stay random


def epoch_order(
    rows: int,
    epoch: int,
    seed: int,
    *,
    shuffle: bool,
    batch_rows: int,
    text_length: Callable[[int], int] | None = None,
    start: int = 0,
) -> Iterator[int]:
    """Yield row indices from place `start` of an epoch's order; each row of 0..rows-1 has one place.

    With `text_length`, each window of 64 global batches of that order is sorted by length (ties by index), cut into
    global batches, and these are put in random order; an incomplete one stays last. Only the windows that are reached
    are measured, so it costs nothing ahead, whatever the source.

    Args:
        rows: number of rows.
        epoch: from 0.
        seed: of the order.
        shuffle: a random permutation of the rows; otherwise they come as they lie in the source.
        batch_rows: rows of a global batch.
        text_length: a row's length in any unit; None does not group.
        start: places to pass over.
    """
    order = generator(seed, "data/order", epoch).permutation(rows) if shuffle else np.arange(rows)
    if text_length is None:
        yield from map(int, order[start:])
        return
    window_rows = GROUP_BATCHES * batch_rows
    for window in range(start // window_rows, -(-rows // window_rows)):
        places = _grouped(order[window * window_rows :][:window_rows], seed, epoch, window, batch_rows, text_length)
        yield from map(int, places[max(0, start - window * window_rows) :])


def _grouped(
    indices: np.ndarray, seed: int, epoch: int, window: int, batch_rows: int, text_length: Callable[[int], int]
) -> np.ndarray:
    lengths = np.fromiter((text_length(int(index)) for index in indices), dtype=np.int64, count=len(indices))
    indices = indices[np.lexsort((indices, lengths))]
    whole = len(indices) // batch_rows
    batches = indices[: whole * batch_rows].reshape(whole, batch_rows)
    shuffled = generator(seed, "data/windows", epoch, window).permutation(batches)
    return np.concatenate([shuffled.reshape(-1), indices[whole * batch_rows :]])
