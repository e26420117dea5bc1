from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.exchanged import together
from unmask.config.data import DataloaderConfig, DatasetConfig
from unmask.config.reader import read_section
from unmask.data.batches import rounded, validation_set
from unmask.data.conversation import Conversation, Message
from unmask.data.encode import Dropped, EncodedRow, RowEncoder
from unmask.data.loader import TrainLoader
from unmask.data.order import epoch_windows
from unmask.data.position import row_digest
from unmask.data.sources import open_rows
from unmask.data.template_loading import load_template
from unmask.errors import ConfigError, DataError

PAD = 9999  # no row's token


@dataclass
class Numbered:
    """Rows whose tokens are their own index, of varied length; every `hole`-th gives nothing to train on."""

    count: int
    hole: int = 0
    fingerprint: str = "numbered"
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        raise AssertionError("the loader reads rows through its encoder")

    def text_length(self, index: int) -> int:
        return (index * 7919) % 61 + 2

    def describe(self, index: int) -> str:
        return f"row {index}"

    def encode(self, index: int, epoch: int) -> EncodedRow | Dropped:
        if self.hole and index % self.hole == 0:
            return Dropped("a hole", f"row {index}")
        length = self.text_length(index)
        return EncodedRow(np.full(length, index, dtype=np.int64), np.arange(length) >= length // 2)


def loader(rows: Numbered, **changes) -> TrainLoader:
    names = ("shuffle", "group_by_length", "num_workers")
    config = DataloaderConfig(**{name: changes.pop(name) for name in names if name in changes})
    sizes = {"global_batch_size": 8, "local_batch_size": 2, "seed": 3, "pad_token_id": PAD, "supervise_padding": False}
    return TrainLoader(rows, rows.encode, config=config, **{**sizes, **changes})


def content(batches) -> list[tuple]:
    """What a step trains on, whatever its division: each row's id, slot, epoch and supervised tokens."""
    rows = []
    for batch in batches:
        for i, sample in enumerate(batch.sample_ids_B.tolist()):
            seen = batch.input_ids_BL[i][batch.input_ids_BL[i] != PAD].tolist()
            slot, length = batch.slots_B[i].item(), batch.answer_lengths_B[i].item()
            assert seen == [sample] * len(seen)
            rows.append((sample, slot, batch.epoch, batch.global_rows, length, len(seen)))
    return sorted(rows)


def ids(batches) -> list[int]:
    return [sample for batch in batches for sample in batch.sample_ids_B.tolist()]


@pytest.mark.parametrize("supervise_padding", [False, True])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_global_batch_does_not_depend_on_its_division(group_by_length, supervise_padding):
    rows = Numbered(50, hole=5)
    settings = {"group_by_length": group_by_length, "supervise_padding": supervise_padding}
    whole = [content(step) for step in islice(loader(rows, local_batch_size=8, **settings), 12)]
    for local, world in [(1, 1), (2, 1), (4, 2), (1, 8), (2, 2)]:
        ranks = together(partial(loader, rows, local_batch_size=local, **settings), world, 12)
        for expected, *steps in zip(whole, *ranks, strict=True):
            assert all(len(step) == 8 // (local * world) for step in steps)
            assert all(batch.input_ids_BL.shape[0] == local for step in steps for batch in step)
            joined = [batch for step in steps for batch in step]
            assert content(joined) == expected
            assert sorted(batch.slots_B[i].item() for batch in joined for i in range(local)) == list(range(8))
            if supervise_padding:
                assert len({batch.input_ids_BL.shape[1] for batch in joined}) == 1


def test_a_row_is_encoded_by_one_rank_and_by_the_same_in_each_epoch():
    encoded: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}

    def make(rank: int, **sizes) -> TrainLoader:
        rows = loader(Numbered(24, hole=7), rank=rank, local_batch_size=1, global_batch_size=6, **sizes)
        encode = rows.encode

        def noted(index: int, epoch: int) -> EncodedRow | Dropped:
            encoded[rank].add(index)
            return encode(index, epoch)

        rows.encode = noted
        return rows

    together(make, 3, 6)  # two epochs
    assert encoded == {rank: set(range(rank, 24, 3)) for rank in range(3)}


@pytest.mark.parametrize("bad", [0, 9, 23])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_bad_row_ends_all_ranks_after_the_same_step(world, bad):
    @dataclass
    class Bad(Numbered):
        def encode(self, index: int, epoch: int) -> EncodedRow | Dropped:
            if index == bad:
                raise DataError(f"row {index} is bad")
            return super().encode(index, epoch)

    made: list[int] = []

    def make(**sizes) -> TrainLoader:
        return Counting(loader(Bad(24), local_batch_size=1, global_batch_size=4, shuffle=False, **sizes), made)

    with pytest.raises(DataError, match=f"^row {bad} is bad$"):
        together(make, world, 12)
    assert made == [bad // 4] * world


class Counting:
    """A loader whose steps are counted when it ends."""

    def __init__(self, inner: TrainLoader, made: list[int]) -> None:
        self.inner, self.made = inner, made

    def __iter__(self):
        count = 0
        try:
            for step in self.inner:
                count += 1
                yield step
        finally:
            self.made.append(count)


@pytest.mark.parametrize(("local", "world"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_rank_knows_the_rows_that_all_hold_at_once(local, world):
    ranks = together(partial(loader, Numbered(40), local_batch_size=local), world, 6)
    for steps in zip(*ranks, strict=True):
        for at_once in zip(*steps, strict=True):
            held = sorted(ids(at_once))
            assert len(held) == local * world
            assert [sorted(batch.peers_P.tolist()) for batch in at_once] == [held] * world


def test_rows_that_lost_their_end_are_marked():
    @dataclass
    class Cut(Numbered):
        def encode(self, index: int, epoch: int) -> EncodedRow | Dropped:
            return replace(super().encode(index, epoch), cut=index % 3 == 0)

    rows = Cut(16)
    held = validation_set(rows, rows.encode, local_batch_size=3, pad_token_id=PAD, supervise_padding=False)
    seen = 0
    for batch in [*next(iter(loader(rows))), *held.batches]:
        assert batch.cut_B.tolist() == [sample % 3 == 0 for sample in batch.sample_ids_B.tolist()]
        seen += len(batch.cut_B)
    assert seen == 8 + 16
    # A validation set is scored by one process: nobody else holds rows beside a batch's own.
    assert all(torch.equal(batch.peers_P, batch.sample_ids_B) for batch in held.batches)


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(8, 60),
    hole=st.sampled_from([0, 3, 7]),
    done=st.integers(0, 14),
    shuffle=st.booleans(),
    group_by_length=st.booleans(),
)
def test_a_resumed_loader_goes_on_exactly(count, hole, done, shuffle, group_by_length):
    rows = Numbered(count + 8, hole)
    settings = {"shuffle": shuffle, "group_by_length": group_by_length}
    first = loader(rows, **settings)
    steps = iter(first)
    for _ in range(done):
        next(steps)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = loader(rows, **settings)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for expected, got in islice(zip(steps, resumed, strict=False), 6):
        assert [torch.equal(a.input_ids_BL, b.input_ids_BL) for a, b in zip(expected, got, strict=True)]
        assert ids(got) == ids(expected) and content(got) == content(expected)
        assert resumed.state_dict() == first.state_dict()


@pytest.mark.parametrize(
    "changes, key",
    [({"seed": 4}, "seed"), ({"shuffle": False}, "shuffle"), ({"group_by_length": True}, "grouped_by_batches_of")],
)
def test_a_position_of_another_order_is_refused(changes, key):
    state = loader(Numbered(40)).state_dict()
    with pytest.raises(DataError, match=f"does not fit this run, {key} was"):
        loader(Numbered(40), **changes).load_state_dict(state)
    with pytest.raises(DataError, match="fingerprint was numbered and is other"):
        loader(Numbered(40, fingerprint="other")).load_state_dict(state)


def test_each_epoch_visits_each_row_once_in_its_own_order():
    rows = Numbered(40)
    steps = list(islice(loader(rows), 10))
    first, second = [i for step in steps[:5] for i in ids(step)], [i for step in steps[5:] for i in ids(step)]
    assert sorted(first) == sorted(second) == list(range(40))
    assert {frozenset(ids(step)) for step in steps[:5]} != {frozenset(ids(step)) for step in steps[5:]}
    assert [step[0].epoch for step in steps] == [0] * 5 + [1] * 5
    assert [sorted(ids(step)) for step in islice(loader(rows, shuffle=False), 2)] == [
        list(range(8)),
        list(range(8, 16)),
    ]


def test_dropped_rows_are_replaced_and_counted_once():
    rows = Numbered(44, hole=4)  # 33 rows remain: 4 batches an epoch, one row left over
    source = loader(rows)
    steps = list(islice(source, 9))
    assert [step[0].epoch for step in steps] == [0] * 4 + [1] * 4 + [2]
    assert all(sample % 4 for step in steps for sample in ids(step))
    assert source.dropped == {"a hole": 11}
    assert set(source.examples) == {"a hole"} and source.steps_per_epoch == 5


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="7 rows do not fill one global batch of 8"):
        loader(Numbered(7))
    with pytest.raises(DataError, match="a whole pass over 10 rows gives 5 to train on, .*dropped: 5 a hole"):
        next(iter(loader(Numbered(10, hole=2))))
    with pytest.raises(ConfigError, match="8 is no multiple of local_batch_size 3"):
        loader(Numbered(40), local_batch_size=3)
    with pytest.raises(ConfigError, match="dataloader.num_workers: must be 0 or more"):
        read_section(DataloaderConfig, {"num_workers": -1}, "dataloader")


def test_grouping_by_length_saves_padding_and_visits_each_row_once(monkeypatch):
    monkeypatch.setattr("unmask.config.data.LENGTH_MULTIPLE", 1)
    rows = Numbered(1000)

    def padding(group_by_length: bool) -> float:
        steps = list(islice(loader(rows, group_by_length=group_by_length, local_batch_size=8), 125))
        assert sorted(i for step in steps for i in ids(step)) == list(range(1000))
        masks = [batch.attention_mask_BL for step in steps for batch in step]
        return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    assert padding(True) < 0.05 < 0.3 < padding(False)
    longest = [max(map(rows.text_length, ids(step))) for step in islice(loader(rows, group_by_length=True), 64)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def order(rows: int, epoch: int, start: int = 0, **settings) -> Iterator[int]:
    windows = epoch_windows(rows, epoch, 1, shuffle=True, batch_rows=2, start=start, **settings)
    return islice((index for _, window in windows for index in window), start % 128, None)


def test_grouping_measures_only_the_rows_it_reaches():
    measured = []

    def text_length(index: int) -> int:
        measured.append(index)
        return index

    some = order(100_000, 0, text_length=text_length)
    assert measured == []
    assert len(set(islice(some, 3))) == 3 and len(measured) == 128
    full = list(order(1000, 2, text_length=lambda i: i % 17))
    assert sorted(full) == list(range(1000))
    for start in (1, 127, 128, 999):
        assert list(order(1000, 2, start, text_length=lambda i: i % 17)) == full[start:]
    # A window that was begun keeps its order, whatever its rows measure now.
    begun = full[128:256]
    assert list(order(1000, 2, 150, text_length=lambda i: i % 5, begun=begun))[: 256 - 150] == full[150:256]


def test_padding_is_lean_unless_it_is_supervised():
    rows = Numbered(40)
    for batch in next(iter(loader(rows))):
        lengths = [rows.text_length(i) for i in batch.sample_ids_B.tolist()]
        width = batch.input_ids_BL.shape[1]
        assert width % 16 == 0 and max(lengths) <= width < max(lengths) + 16
        assert batch.attention_mask_BL.sum(dim=1).tolist() == lengths
        assert batch.answer_lengths_B.tolist() == [n - n // 2 for n in lengths]
        assert (batch.input_ids_BL[~batch.attention_mask_BL] == PAD).all()
        assert not batch.supervised_BL[~batch.attention_mask_BL].any()
    for batch in next(iter(loader(rows, supervise_padding=True))):
        width = batch.input_ids_BL.shape[1]
        lengths = [rows.text_length(i) for i in batch.sample_ids_B.tolist()]
        assert batch.attention_mask_BL.all()
        assert batch.answer_lengths_B.tolist() == [width - n // 2 for n in lengths]


@pytest.mark.parametrize(("length", "most", "width"), [(1, None, 16), (16, None, 16), (17, 20, 20), (17, 40, 32)])
def test_padding_is_rounded_up_but_not_beyond_the_longest_row_allowed(length, most, width):
    assert rounded(length, most) == width


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(loader(Numbered(40))))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def encoder(tmp_path, tokenizer) -> RowEncoder:
    path = tmp_path / "rows.jsonl"
    turns = ["user", "assistant"]
    lines = [{"messages": [{"role": r, "content": "x" * (i % 13 + 1)} for r in turns * (i % 3 + 1)]} for i in range(60)]
    lines[7]["messages"][0]["content"] = "long " * 40  # nothing of its answer is left
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DatasetConfig(str(path), seq_length=100, answers="one")
    return RowEncoder(open_rows(config), load_template(tokenizer, "llada"), config)


@pytest.mark.timeout(60)
def test_workers_change_nothing_and_do_not_advance_the_position(encoder):
    def made(num_workers: int) -> TrainLoader:
        return TrainLoader(
            encoder.rows,
            encoder,
            config=DataloaderConfig(num_workers=num_workers, group_by_length=True),
            global_batch_size=8,
            local_batch_size=4,
            seed=1,
            pad_token_id=PAD,
            supervise_padding=True,
        )

    alone, helped = made(0), made(2)
    steps = iter(helped)
    for expected, got in zip(islice(alone, 9), steps, strict=False):
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a.input_ids_BL, b.input_ids_BL) and torch.equal(a.slots_B, b.slots_B)
        assert helped.state_dict() == alone.state_dict()
    steps.close()
    (reason,) = helped.dropped
    assert helped.dropped == {reason: 1} and reason == "no supervised token within seq_length"
    place = helped.examples[reason]  # the encoder has no more to say, so the row is named
    assert place.startswith(encoder.rows.describe(0).rpartition(":")[0] + ":")


def test_validation_batches_are_fixed_and_their_content_is_independent_of_their_size():
    rows = Numbered(30, hole=4)

    def encoded(size: int, supervise_padding: bool = True):
        sizes = {"local_batch_size": size, "pad_token_id": PAD}
        return validation_set(rows, rows.encode, supervise_padding=supervise_padding, **sizes)

    def batches(size: int, supervise_padding: bool = True):
        return encoded(size, supervise_padding).batches

    assert content(batches(4)) == content(batches(7)) == content(batches(30))
    assert {batch.input_ids_BL.shape[1] for batch in batches(4)} == {max(map(rows.text_length, set(ids(batches(4)))))}
    assert content(batches(4, False)) == content(batches(30, False))
    assert {batch.global_rows for batch in batches(4)} == {22}
    assert encoded(4).dropped == {"a hole": 8} and encoded(4).examples == {"a hole": "row 0"}
    with pytest.raises(DataError, match="none of its 3 rows has a supervised token"):
        empty = Numbered(3, hole=1)
        validation_set(empty, empty.encode, local_batch_size=1, pad_token_id=PAD, supervise_padding=False)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("hole", [0, 5])
def test_without_shuffling_rows_that_fill_no_batch_come_first_in_the_next_epoch(group_by_length, hole):
    rows = Numbered(45, hole)
    usable = {index for index in range(45) if not hole or index % hole}
    source = loader(rows, shuffle=False, group_by_length=group_by_length)
    epochs: dict[int, list[int]] = {}
    for step in islice(source, 16):
        epochs.setdefault(step[0].epoch, []).extend(ids(step))
    for epoch in (0, 1):
        assert len(set(epochs[epoch])) == len(epochs[epoch])
        left = usable - set(epochs[epoch])
        assert 0 < len(left) < 8 and left <= set(epochs[epoch + 1][:8])
    if not group_by_length and not hole:
        assert sorted(epochs[0]) == list(range(40))
        assert sorted(epochs[1][:8]) == [0, 1, 2, *range(40, 45)] and sorted(epochs[1][8:16]) == list(range(3, 11))


def test_the_rows_that_a_short_run_never_reaches_are_named():
    assert loader(Numbered(45), shuffle=False).never_seen(5) == (
        "5 of 45 rows, from row 40 on, are never seen: dataloader.shuffle is false, and 5 steps of 8 rows end before "
        "them"
    )
    assert loader(Numbered(45), shuffle=False, group_by_length=True).never_seen(2).startswith("29 of 45 rows are never")
    assert loader(Numbered(45), shuffle=False).never_seen(6) is None
    assert loader(Numbered(45)).never_seen(2) is None


@dataclass
class Worded(Numbered):
    """Rows with a text each, which the encoder digests; a row without one is malformed."""

    texts: list[str | None] = field(default_factory=list)

    @classmethod
    def of(cls, texts: list[str | None]) -> Worded:
        return cls(len(texts), fingerprint=repr(texts), texts=list(texts))

    def __getitem__(self, index):
        if self.texts[index] is None:
            raise DataError(f"row {index} is malformed")
        return Conversation((Message("assistant", self.texts[index]),))

    def text_length(self, index: int) -> int:
        return len(self.texts[index] or "")

    def encode(self, index: int, epoch: int) -> EncodedRow | Dropped:
        if self.texts[index] is None:
            return Dropped("malformed")
        length = self.text_length(index)
        tokens = np.full(length, index, dtype=np.int64)
        return EncodedRow(tokens, np.ones(length, dtype=bool), digest=row_digest(self[index]))


def words(count: int) -> list[str | None]:
    return ["x" * (2 + index * 7 % 13) + str(index) for index in range(count)]


def after(texts: list[str | None], steps: int, **settings) -> tuple[TrainLoader, dict, set[int]]:
    """Return a loader after so many steps, its position, and the rows that lie behind it."""
    source = loader(Worded.of(texts), **settings)
    behind = {sample for step in islice(source, steps) for sample in ids(step)}
    return source, json.loads(json.dumps(source.state_dict())), behind


SETTINGS = [{}, {"shuffle": False}, {"group_by_length": True}]
BEHIND = "the data, but none of the rows trained on so far"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_data_that_changed_ahead_of_a_position_are_accepted(settings, steps):
    texts = words(60)
    _, state, behind = after(texts, steps, **settings)
    mended = sorted(set(range(60)) - behind)[:3]
    changed = [text + "!" * 20 if index in mended else text for index, text in enumerate(texts)]
    resumed = loader(Worded.of(changed), **settings)
    position, note = resumed.reconcile(state, accept_changed=False)
    assert note == BEHIND
    resumed.load_state_dict(position)
    rest = {sample for step in islice(resumed, 7 - steps) for sample in ids(step)}
    assert len(rest) == 8 * (7 - steps) and not rest & behind  # no row twice in an epoch, whatever its length now


@pytest.mark.parametrize("settings", SETTINGS)
def test_data_that_lie_elsewhere_now_are_accepted(settings):
    source, state, _ = after(words(60), 9, **settings)
    moved = loader(replace(Worded.of(words(60)), fingerprint="moved"), **settings)
    position, note = moved.reconcile(state, accept_changed=False)
    assert note == BEHIND
    moved.load_state_dict(position)
    assert ids(next(iter(moved))) == ids(next(iter(source)))


@pytest.mark.parametrize("steps", [3, 9])
@pytest.mark.parametrize("settings", SETTINGS)
def test_data_that_changed_under_what_was_trained_on_are_refused_unless_accepted(settings, steps):
    texts = words(60)
    _, state, behind = after(texts, steps, **settings)
    one = min(behind)
    changed = [text + "!" if index == one else text for index, text in enumerate(texts)]
    resumed = loader(Worded.of(changed), **settings)
    with pytest.raises(DataError, match="rows that it was trained on are no longer the same$"):
        resumed.reconcile(state, accept_changed=False)
    position, note = resumed.reconcile(state, accept_changed=True)
    assert note == "rows that were trained on; checkpoint.accept_changed_data goes on with them as they are"
    resumed.load_state_dict(position)
    next(iter(resumed))
    # From here on the rows as they are now are the ones that count.
    again = loader(Worded.of(changed), **settings)
    assert again.reconcile(resumed.state_dict(), accept_changed=False) == (resumed.state_dict(), None)
    again = loader(replace(Worded.of(changed), fingerprint="moved"), **settings)
    assert again.reconcile(resumed.state_dict(), accept_changed=False)[1] == BEHIND


def test_rows_added_at_the_end_put_shuffled_rows_in_another_order():
    texts = words(60)
    for steps in (2, 9):
        _, state, _ = after(texts, steps)
        with pytest.raises(DataError, match=r"no longer the same \(60 rows then, 61 now\)"):
            loader(Worded.of([*texts, "more"])).reconcile(state, accept_changed=False)
        more = loader(Worded.of([*texts, "more"]))
        more.load_state_dict(more.reconcile(state, accept_changed=True)[0])
        assert len(ids(next(iter(more)))) == 8
    _, state, _ = after(texts, 2, shuffle=False)
    more = loader(Worded.of([*texts, "more"]), shuffle=False)
    position, note = more.reconcile(state, accept_changed=False)
    assert note == BEHIND
    more.load_state_dict(position)
    assert sorted(ids(next(iter(more)))) == list(range(16, 24))


def test_a_row_that_was_left_out_and_is_mended_has_changed_too():
    texts = words(60)
    texts[0] = None
    _, state, _ = after(texts, 1, shuffle=False)
    with pytest.raises(DataError, match="no longer the same"):
        loader(Worded.of(words(60)), shuffle=False).reconcile(state, accept_changed=False)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "0"}, {"epoch": -1}, {"cursor": 2.0}, {"cursor": 61}, {"window": [[]]}, {"carried": 5},
        {"carried": [99]}, {"visited": "g"}, {"visited": 5}, {"dropped": []}, {"dropped": {"long": "x"}},
        {"noted": 3}, {"examples": []}, {"order": 5}, {"order": {}},
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_never_reconciled(change):
    _, state, _ = after(words(60), 1)
    loader(Worded.of(words(60))).reconcile(state, accept_changed=False)
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        loader(Worded.of(words(60))).reconcile({**state, **change}, accept_changed=False)
