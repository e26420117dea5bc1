"""A window's forward over a store of keys and values: what it computes, what it writes and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from unmask.models.kv_cache import KeyValueStore
from unmask.models.llada.model import LLaDA
from unmask.sampling.backends.window import Window, forward_window, spans

Make = Callable[..., LLaDA]
VARIANTS = [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "weight_tying": True}, {"include_bias": True}]


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 27, (rows, length), generator=torch.Generator().manual_seed(seed))


def window_of(store: KeyValueStore, first, end, lengths, rows=None) -> Window:
    return Window.of(store, spans(torch.tensor(first), torch.tensor(end)), lengths, rows)


def run(model: LLaDA, ids_KL: Tensor, window: Window) -> Tensor:
    """The hidden states of a window of rows with these tokens."""
    return forward_window(model, ids_KL.gather(1, window.positions_KS), window)


def empty(model: LLaDA, rows: int, columns: int) -> KeyValueStore:
    heads = [(model.config.kv_heads, model.config.head_dim)] * model.config.n_layers
    return KeyValueStore.empty(heads, rows, columns, like=model.transformer.wte.weight)


def filled(model: LLaDA, ids_BL: Tensor, lengths: Sequence[int]) -> tuple[KeyValueStore, Tensor]:
    """A store of all positions, and the hidden states that came with it."""
    store = empty(model, *ids_BL.shape)
    return store, run(model, ids_BL, window_of(store, [0] * len(ids_BL), lengths, lengths))


def copied(store: KeyValueStore) -> KeyValueStore:
    return KeyValueStore(map(Tensor.clone, store.keys), map(Tensor.clone, store.values))


def assert_same(left: KeyValueStore, right: KeyValueStore) -> None:
    for one, other in zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_window_of_everything_is_the_forward(fields: dict, network: Make) -> None:
    model, ids_BL = network(**fields), tokens(3, 11)
    with torch.no_grad():
        assert torch.equal(filled(model, ids_BL, [11, 11, 11])[1], model(ids_BL))
        keep_BL = torch.arange(11) < torch.tensor([[7], [11], [4]])
        found, expected = filled(model, ids_BL, [7, 11, 4])[1], model(ids_BL, keep_BL)
    torch.testing.assert_close(found[keep_BL], expected[keep_BL])


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("first", "end", "lengths", "rows"),
    [
        ([4, 4, 4], [8, 8, 8], [11, 11, 11], None),
        ([4, 4, 4], [8, 8, 8], [11, 9, 8], None),
        ([1, 4, 6], [5, 8, 7], [11, 9, 7], None),
        ([5, 3, 1], [11, 9, 8], [11, 9, 8], None),
        ([4, 4], [8, 8], [9, 11], [2, 0]),
        ([2, 7], [5, 11], [9, 11], [2, 0]),
        ([0, 0], [9, 11], [9, 11], [2, 0]),
    ],
)
def test_a_window_over_a_store_of_the_same_tokens_equals_the_full_forward(
    first, end, lengths, rows, fields: dict, network: Make
) -> None:
    model, ids_BL = network(**fields), tokens(3, 11)
    chosen = list(range(3)) if rows is None else rows
    all_lengths = [11, 11, 11]
    for row, length in zip(chosen, lengths, strict=True):
        all_lengths[row] = length
    store, hidden_BLD = filled(model, ids_BL, all_lengths)
    before = copied(store)
    found_KSD = run(model, ids_BL[chosen], window_of(store, first, end, lengths, rows))
    for k, row in enumerate(chosen):
        torch.testing.assert_close(found_KSD[k, : end[k] - first[k]], hidden_BLD[row, first[k] : end[k]])
    for old, new in zip((*before.keys, *before.values), (*store.keys, *store.values), strict=True):
        for row, length in enumerate(all_lengths):
            torch.testing.assert_close(old[row, :, :length], new[row, :, :length])


def test_a_window_writes_its_own_positions_and_nothing_else(network: Make) -> None:
    model, ids_BL = network(), tokens(3, 11)
    store, _ = filled(model, ids_BL, [11, 11, 11])
    before = copied(store)
    window = window_of(store, [2, 5], [7, 6], [11, 11], rows=[2, 0])
    forward_window(model, torch.full((2, 5), 28), window)  # the second row repeats its one position four times
    own = torch.zeros(3, 11, dtype=torch.bool)
    own[2, 2:7] = own[0, 5:6] = True
    for old, new in zip((*before.keys, *before.values), (*store.keys, *store.values), strict=True):
        assert torch.equal((old != new).any(dim=-1).any(dim=1), own)


def test_a_window_may_read_the_tensors_of_another_of_its_layout(network: Make) -> None:
    """As a recorded call does."""
    model, ids_BL = network(), tokens(3, 11)
    for rows, spans_, others in (
        (None, ([1, 1, 1], [5, 5, 5]), ([4, 4, 4], [8, 8, 8])),
        ([2, 0], ([1, 4], [5, 8]), ([6, 2], [10, 6])),
    ):
        lengths = [11, 10, 10][: len(spans_[0])]
        store, _ = filled(model, ids_BL, [11, 10, 10] if rows is None else [10, 11, 11])
        other_store = copied(store)
        first, other = window_of(store, *spans_, lengths, rows), window_of(store, *others, lengths, rows)
        assert first.layout == other.layout
        ids_KS = tokens(len(lengths), 4, seed=3)
        found = forward_window(model, ids_KS, first.with_tensors(other.tensors))
        assert torch.equal(found, forward_window(model, ids_KS, window_of(other_store, *others, lengths, rows)))
        assert_same(store, other_store)
    # A mask, a row's choice and a pass over everything are other kernels.
    layouts = [
        window_of(store, *given).layout
        for given in (
            ([1] * 3, [3] * 3, [11] * 3),
            ([1] * 3, [3] * 3, [11, 9, 9]),
            ([1], [3], [11], [0]),
            ([0] * 3, [11] * 3, [11] * 3),
            ([1] * 3, [3] * 3, [9] * 3),
        )
    ]
    assert len(set(layouts)) == len(layouts)


def test_what_a_window_writes_is_what_later_windows_see(network: Make) -> None:
    model, ids_BL = network(n_layers=1), tokens(2, 11)
    store, _ = filled(model, ids_BL, [11, 11])
    changed_BL = ids_BL.clone()
    changed_BL[:, 4:8] = 28
    run(model, changed_BL, window_of(store, [4, 4], [8, 8], [11, 11]))
    found = run(model, changed_BL, window_of(store, [8, 8], [11, 11], [11, 11]))
    # In one layer keys depend on their own token alone, so nothing is approximate.
    torch.testing.assert_close(found, model(changed_BL)[:, 8:])


def test_a_stale_store_is_an_approximation(network: Make) -> None:
    model, ids_BL = network(n_layers=2), tokens(1, 11)
    store, _ = filled(model, ids_BL, [11])
    changed_BL = ids_BL.clone()
    changed_BL[:, 4:8] = 28
    found = run(model, changed_BL, window_of(store, [4], [8], [11]))
    assert not torch.allclose(found, model(changed_BL)[:, 4:8], atol=1e-3)


def test_columns_beyond_the_longest_row_change_nothing(network: Make) -> None:
    """Windows over all of a store's room are alike, whatever the rows' lengths; numbers are summed in another order."""
    model, ids_BL = network(n_kv_heads=2), tokens(3, 11)
    store, hidden_BLD = filled(model, ids_BL, [11, 6, 9])
    store.reserve(5, 11, 1)
    store.reserve(3, 20, 16)
    assert (store.rows, store.columns) == (5, 32)
    positions_KS = spans(torch.tensor([3, 1, 5]), torch.tensor([7, 5, 9]))
    window = Window.of(store, positions_KS, [11, 6, 9], columns=store.columns)
    assert window.layout == Window.of(store, positions_KS, [9, 9, 9], columns=store.columns).layout
    found_KSD = run(model, ids_BL, window)
    torch.testing.assert_close(found_KSD, hidden_BLD.gather(1, positions_KS[..., None].expand(found_KSD.shape)))


def test_positions_behind_a_rows_length_are_never_seen(network: Make) -> None:
    model, ids_BL = network(), tokens(2, 11)
    found = []
    for junk in (3, 9):
        noisy_BL = ids_BL.clone()
        noisy_BL[1, 8:] = junk
        store, whole_BLD = filled(model, noisy_BL, [11, 8])
        part_BSD = run(model, noisy_BL, window_of(store, [4, 4], [8, 8], [11, 8]))
        found.append((whole_BLD[1, :8], part_BSD))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_store_has_the_models_dtype(network: Make) -> None:
    model, ids_BL = network().bfloat16(), tokens(2, 6)
    store, hidden_BLD = filled(model, ids_BL, [6, 6])
    assert store.keys[0].dtype == torch.bfloat16
    found = run(model, ids_BL, window_of(store, [2, 2], [4, 4], [6, 6]))
    torch.testing.assert_close(found, hidden_BLD[:, 2:4], atol=0.05, rtol=0.05)


def test_gradients_are_not_kept_through_a_store(network: Make) -> None:
    assert not filled(network(), tokens(1, 6), [6])[1].requires_grad
