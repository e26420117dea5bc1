"""A window's forward over a store of keys and values: what it computes, what it writes and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from unmask.models import key_runs
from unmask.models.llada import cache
from unmask.models.llada.cache import KeyValueStore, Window
from unmask.models.llada.model import LLaDA

Make = Callable[..., LLaDA]
VARIANTS = [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "weight_tying": True}, {"include_bias": True}]


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 27, (rows, length), generator=torch.Generator().manual_seed(seed))


def filled(model: LLaDA, ids_BL: Tensor, lengths: Sequence[int]) -> tuple[KeyValueStore, Tensor]:
    """A store of all positions, and the hidden states that came with it."""
    store = model.new_store(len(ids_BL), ids_BL.shape[1])
    window = Window(store, [0] * len(ids_BL), lengths, lengths)
    return store, model.forward_window(ids_BL[:, : window.columns], window)


def copied(store: KeyValueStore) -> KeyValueStore:
    return store.take(range(store.rows))


def assert_same(left: KeyValueStore, right: KeyValueStore) -> None:
    for one, other in zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True):
        assert torch.equal(one, other)


def shown(ids_BL: Tensor, first: Sequence[int], width: int) -> Tensor:
    """The tokens of windows, right-padded; what is behind the row is token 0."""
    columns = torch.tensor(first)[:, None] + torch.arange(width)
    return torch.where(columns < ids_BL.shape[1], ids_BL.gather(1, columns.clamp(max=ids_BL.shape[1] - 1)), 0)


@pytest.fixture(params=[("cpu",), ("cpu", 1), ()], ids=["by slice", "by slice, in runs", "by index"])
def ways_to_write(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on CPUs, as there with rows so long that every other length is a run of its own, and as elsewhere."""
    monkeypatch.setattr(cache, "BY_SLICE", request.param[:1])
    if request.param[1:]:
        monkeypatch.setattr(key_runs, "_CALL", 1)
    key_runs._split.cache_clear()
    yield
    key_runs._split.cache_clear()


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
    first, end, lengths, rows, fields: dict, network: Make, ways_to_write: None
) -> None:
    model, ids_BL = network(**fields), tokens(3, 11)
    chosen = list(range(3)) if rows is None else rows
    all_lengths = [11, 11, 11]
    for row, length in zip(chosen, lengths, strict=True):
        all_lengths[row] = length
    store, hidden_BLD = filled(model, ids_BL, all_lengths)
    before = copied(store)
    window = Window(store, first, end, lengths, rows)
    found_KSD = model.forward_window(shown(ids_BL[chosen], first, window.width), window)
    for k, row in enumerate(chosen):
        torch.testing.assert_close(found_KSD[k, : end[k] - first[k]], hidden_BLD[row, first[k] : end[k]])
    for old, new in zip((*before.keys, *before.values), (*store.keys, *store.values), strict=True):
        for row, length in enumerate(all_lengths):
            torch.testing.assert_close(old[row, :, :length], new[row, :, :length])


def test_a_window_writes_its_own_positions_and_nothing_else(network: Make, ways_to_write: None) -> None:
    model, ids_BL = network(), tokens(3, 11)
    store, _ = filled(model, ids_BL, [11, 11, 11])
    before = copied(store)
    window = Window(store, [2, 5], [7, 6], [11, 11], rows=[2, 0])
    model.forward_window(torch.full((2, 5), 28), window)  # the second row has four queries of padding
    own = torch.zeros(3, 11, dtype=torch.bool)
    own[2, 2:7] = own[0, 5:6] = True
    for old, new in zip((*before.keys, *before.values), (*store.keys, *store.values), strict=True):
        assert torch.equal((old != new).any(dim=-1).any(dim=1), own)


def test_a_window_may_read_the_tensors_of_another_of_its_kind(network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a recorded call does: by index, where nothing but tensors says which positions are written."""
    monkeypatch.setattr(cache, "BY_SLICE", ())
    model, ids_BL = network(), tokens(3, 11)
    for rows, spans, others in (
        (None, ([1, 1, 1], [5, 5, 5]), ([4, 4, 4], [8, 8, 8])),
        ([2, 0], ([1, 4], [5, 8]), ([6, 2], [10, 6])),
    ):
        lengths = [11, 10, 10][: len(spans[0])]
        store, _ = filled(model, ids_BL, [11, 10, 10] if rows is None else [10, 11, 11])
        twin = copied(store)
        first, other = Window(store, *spans, lengths, rows), Window(store, *others, lengths, rows)
        assert first.kind == other.kind
        ids_KS = tokens(len(lengths), 4, seed=3)
        found = model.forward_window(ids_KS, first.reading(list(other.tensors.values())))
        assert torch.equal(found, model.forward_window(ids_KS, Window(twin, *others, lengths, rows)))
        assert_same(store, twin)
    monkeypatch.setattr(cache, "BY_SLICE", ("cpu",))
    assert Window(store, [1], [3], [11], [0]).kind != Window(store, [2], [4], [11], [0]).kind
    assert Window(store, [1, 1], [3, 3], [11, 9]).kind != Window(store, [1, 1], [3, 3], [11, 8]).kind


def test_rows_of_unlike_length_are_told_apart_in_runs(network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would not reach them."""
    store = network().new_store(3, 200)
    assert isinstance(Window(store, [4] * 3, [8] * 3, [20, 199, 200]).mask, tuple)
    assert Window(store, [4] * 3, [8] * 3, [200, 200, 200]).mask is None
    monkeypatch.setattr(cache, "BY_SLICE", ())
    assert isinstance(Window(store, [4] * 3, [8] * 3, [20, 199, 200]).mask, Tensor)


def test_what_a_window_writes_is_what_later_windows_see(network: Make) -> None:
    model, ids_BL = network(n_layers=1), tokens(2, 11)
    store, _ = filled(model, ids_BL, [11, 11])
    changed_BL = ids_BL.clone()
    changed_BL[:, 4:8] = 28
    model.forward_window(changed_BL[:, 4:8], Window(store, [4, 4], [8, 8], [11, 11]))
    found = model.forward_window(changed_BL[:, 8:], Window(store, [8, 8], [11, 11], [11, 11]))
    # In one layer keys depend on their own token alone, so nothing is approximate.
    torch.testing.assert_close(found, model(changed_BL)[:, 8:])


def test_a_stale_store_is_an_approximation(network: Make) -> None:
    model, ids_BL = network(n_layers=2), tokens(1, 11)
    store, _ = filled(model, ids_BL, [11])
    changed_BL = ids_BL.clone()
    changed_BL[:, 4:8] = 28
    found = model.forward_window(changed_BL[:, 4:8], Window(store, [4], [8], [11]))
    assert not torch.allclose(found, model(changed_BL)[:, 4:8], atol=1e-3)


def test_positions_behind_a_rows_length_are_never_seen(network: Make) -> None:
    model, ids_BL = network(), tokens(2, 11)
    found = []
    for junk in (3, 9):
        noisy_BL = ids_BL.clone()
        noisy_BL[1, 8:] = junk
        store, whole_BLD = filled(model, noisy_BL, [11, 8])
        part_BSD = model.forward_window(noisy_BL[:, 4:8], Window(store, [4, 4], [8, 8], [11, 8]))
        found.append((whole_BLD[1, :8], part_BSD))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("wider", [False, True])
def test_joined_and_taken_stores_equal_those_made_at_once(wider: bool, network: Make) -> None:
    model = network(n_kv_heads=2)
    ids_BL, lengths = tokens(3, 11), [11, 6, 9]
    together, _ = filled(model, ids_BL, lengths)
    long, _ = filled(model, ids_BL[:1], lengths[:1])
    short, _ = filled(model, ids_BL[1:, :9], lengths[1:])
    joined = long.join(short) if wider else short.join(long).take([2, 0, 1])
    assert (joined.rows, joined.columns) == (3, 11)
    for window in (Window(joined, [3, 1, 5], [7, 5, 9], lengths), Window(together, [3, 1, 5], [7, 5, 9], lengths)):
        model.forward_window(shown(ids_BL, [3, 1, 5], 4), window)
    for one, other in zip((*joined.keys, *joined.values), (*together.keys, *together.values), strict=True):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(one[row, :, :length], other[row, :, :length])
    taken = together.take([2, 0])
    assert_same(taken, together.take([0, 2]).take([1, 0]))
    taken.keys[0].zero_()  # a copy: the rows that it came from stay as they are
    assert bool(together.keys[0][0].any())


def test_a_widened_store_keeps_what_it_has(network: Make) -> None:
    store, _ = filled(network(), tokens(2, 6), [6, 6])
    wide = store.widened(9)
    assert wide.columns == 9 and store.widened(5) is store
    for old, new in zip((*store.keys, *store.values), (*wide.keys, *wide.values), strict=True):
        assert torch.equal(new[:, :, :6], old) and not new[:, :, 6:].any()


def test_a_store_has_the_models_dtype(network: Make) -> None:
    model, ids_BL = network().bfloat16(), tokens(2, 6)
    store, hidden_BLD = filled(model, ids_BL, [6, 6])
    assert store.keys[0].dtype == torch.bfloat16
    found = model.forward_window(ids_BL[:, 2:4], Window(store, [2, 2], [4, 4], [6, 6]))
    torch.testing.assert_close(found, hidden_BLD[:, 2:4], atol=0.05, rtol=0.05)


def test_gradients_are_not_kept_through_a_store(network: Make) -> None:
    assert not filled(network(), tokens(1, 6), [6])[1].requires_grad
