"""A store of keys and values: room that is taken ahead of need, written in place, with rows that join and leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.models.kv_cache import KeyValueStore

HEADS = [(2, 4), (1, 6)]
# A step: what happens, and a number that chooses rows and sizes.
steps = st.lists(st.tuples(st.sampled_from(["join", "write", "leave"]), st.integers(0, 2**20)), min_size=1, max_size=12)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(rows: int, columns: int, seed: int) -> list[Tensor]:
    return [normal(rows, count, columns, size, seed=seed + layer) for layer, (count, size) in enumerate(HEADS)]


@given(steps=steps, multiple=st.sampled_from([1, 3, 8]))
@settings(max_examples=60)
def test_rows_hold_what_was_written_to_them_whoever_joins_and_leaves(steps: list, multiple: int) -> None:
    store = KeyValueStore.empty(HEADS, 0, 0, torch.zeros(0))
    rows: list[list[Tensor]] = []  # of each row the keys of each layer, (G, length, E); its values are their negatives

    def lengths() -> list[int]:
        return [row[0].shape[1] for row in rows]

    for kind, number in steps:
        where, pointers, room = store.addresses, [t.data_ptr() for t in store.keys], (store.rows, store.columns)
        if kind == "join":
            count, columns = 1 + number % 3, 1 + number % 7
            more = layers(count, columns, number)
            fresh = KeyValueStore(more, [-keys for keys in more])
            store.reserve(len(rows) + count, columns, multiple)
            store.put(len(rows), fresh, count, columns)
            rows += [[keys[row] for keys in more] for row in range(count)]
        elif kind == "write" and rows:
            chosen = [row for row in range(len(rows)) if number >> row & 1] or [len(rows) - 1]
            size = 1 + number % 4
            more = layers(len(chosen), size, number)
            store.reserve(len(rows), max(lengths()) + size, multiple)
            positions = torch.tensor([lengths()[row] for row in chosen])[:, None] + torch.arange(size)
            everyone = chosen == list(range(len(rows)))
            for layer, keys in enumerate(more):
                store.write(layer, None if everyone else torch.tensor(chosen), positions, keys, -keys)
            for place, row in enumerate(chosen):
                rows[row] = [torch.cat((old, new[place]), dim=1) for old, new in zip(rows[row], more, strict=True)]
        elif kind == "leave" and rows:
            kept = [row for row in range(len(rows)) if number >> row & 1]
            store.keep(torch.tensor(kept, dtype=torch.long), max(lengths()))
            rows = [rows[row] for row in kept]
        # What fits moves nothing.
        grown = (store.rows, store.columns) != room
        assert (store.addresses is not where) == grown
        assert grown or [tensor.data_ptr() for tensor in store.keys] == pointers
        assert store.columns % multiple == 0
        for layer in range(len(HEADS)):
            for row, held in enumerate(rows):
                length = held[layer].shape[1]
                assert torch.equal(store.keys[layer][row, :, :length], held[layer])
                assert torch.equal(store.values[layer][row, :, :length], -held[layer])
            assert store.keys[layer].isfinite().all() and store.values[layer].isfinite().all()


@pytest.mark.parametrize("change", [lambda store: store.reserve(2, 5, 4), lambda store: store.reserve(3, 2, 4)])
def test_room_is_made_in_whole_multiples_for_rows_and_columns_alike(change: Callable[[KeyValueStore], None]) -> None:
    keys = layers(2, 4, 0)
    store = KeyValueStore(keys, keys)
    store.reserve(1, 3, 4)
    assert all(mine is given for mine, given in zip(store.keys, keys, strict=True))
    change(store)
    assert (store.rows, store.columns) in ((2, 8), (3, 4))
    for mine, given_ in zip(store.keys, keys, strict=True):
        assert torch.equal(mine[:2, :, :4], given_) and mine[2:].sum() == mine[:, :, 4:].sum() == 0
