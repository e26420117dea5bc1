"""A check before training looks at every row that it has the time for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from unmask.data import check
from unmask.data.check import Checked, check_rows
from unmask.data.encode import Dropped, EncodedRow, RememberedRows
from unmask.errors import DataError


@dataclass
class Source:
    """Rows that take `cost` seconds each, by a clock that only they move; some are bad, some are to be left out."""

    count: int
    cost: float = 0.001
    bad: frozenset[int] = frozenset()
    now: float = 0.0
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def describe(self, index: int) -> str:
        return f"row {index}"

    def __call__(self, index: int, epoch: int) -> EncodedRow | Dropped:
        self.now += self.cost
        self.asked.append(index)
        if index in self.bad:
            raise DataError(f"row {index} is bad")
        if index % 100 == 7:
            return Dropped("too long")
        return EncodedRow(np.arange(2), np.ones(2, dtype=bool), notes=("key 'id' that nothing reads",))


def checked(source: Source, monkeypatch: pytest.MonkeyPatch, **options) -> Checked:
    monkeypatch.setattr(check.time, "monotonic", lambda: source.now)
    return check_rows(source, source, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000])
def test_every_row_is_checked_once_where_that_is_quick(monkeypatch, count):
    source = Source(count)
    found = checked(source, monkeypatch)
    assert sorted(source.asked) == list(range(count))
    assert (found.count, found.total) == (count, count)
    assert found.summary == f"all {count:,} rows rendered and tokenised"
    left_out = {"too long": -(-(count - 7) // 100)} if count > 7 else {}
    assert found.dropped == left_out
    assert found.noted == {"key 'id' that nothing reads": count - sum(left_out.values())}
    assert found.examples["key 'id' that nothing reads"] == "row 0"


def test_a_bad_row_is_named_wherever_it_is(monkeypatch):
    for bad in (0, 500, 999):
        with pytest.raises(DataError, match=f"row {bad} is bad"):
            checked(Source(1000, bad=frozenset([bad])), monkeypatch)


def test_of_rows_that_would_take_more_than_a_minute_a_sample_over_all_of_them_is_checked(monkeypatch):
    source = Source(600_000)
    found = checked(source, monkeypatch)
    assert found.count == len(set(source.asked)) == len(source.asked)
    assert 9_000 < found.count < 11_000 and source.now < 11
    gaps = np.diff(sorted(source.asked))
    assert gaps.max() < 100 and max(source.asked) > 599_900  # spread over the source
    assert "of 600,000 rows rendered and tokenised, a sample over all of the source" in found.summary
    assert found.summary.endswith("all of them would take about 10 min")


def test_rows_that_take_longer_than_the_first_ones_are_checked_for_a_minute(monkeypatch):
    source = Source(50_000)
    monkeypatch.setattr(Source, "cost", property(lambda self: 0.001 if len(self.asked) < 64 else 0.01, lambda *_: None))
    found = checked(source, monkeypatch)
    assert 60 <= source.now < 62 and 5_900 < found.count < 6_200
    assert np.diff(sorted(source.asked)).max() < 1_000
    assert found.summary.endswith("all of them would take about 9 min")


@pytest.mark.parametrize(
    "count, processes, workers, all_of_them",
    [
        (5_000, 8, 0, True),  # five seconds alone: workers would take longer to start
        (100_000, 1, 0, False),
        (100_000, 4, 4, True),  # 100 seconds alone, 35 with four workers
        (350_000, 32, 8, True),
        (800_000, 32, 0, False),
    ],
)
def test_workers_are_started_where_they_save_time(monkeypatch, count, processes, workers, all_of_them):
    used = []

    def encoded_ahead(encode, visits, num_workers, lookahead):
        used.append(num_workers)
        encode.cost = 0.001 / max(1, num_workers)
        return ((visit, encode(visit.index, visit.epoch)) for visit in visits)

    monkeypatch.setattr(check, "encoded_ahead", encoded_ahead)
    found = checked(Source(count), monkeypatch, processes=processes)
    assert used[-1] == workers and (found.count == count) == all_of_them


def test_progress_is_told_up_to_the_end(monkeypatch):
    for count in (1_000, 600_000):
        reported: list[tuple[int, int]] = []
        found = checked(
            Source(count), monkeypatch, tick=lambda done, of, reported=reported: reported.append((done, of))
        )
        assert [done for done, _ in reported] == sorted(done for done, _ in reported)
        assert reported[-1][0] <= reported[-1][1] and found.count - reported[-1][0] < 64
        assert abs(reported[-1][1] - found.count) < 200


def test_what_was_checked_here_need_not_be_encoded_again():
    source = Source(200)
    remembered = RememberedRows(source)
    check_rows(source, remembered)  # pyright: ignore[reportArgumentType]
    for index in range(200):
        remembered(index, 0)
    assert sum(index % 100 != 7 for index in source.asked) == 198
