"""The benchmarks' tables: what was recorded can be shown, and a bound that is missed is marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import BENCHMARKS
from benchmarks.bounds import at_least, at_most

RESULTS = Path(str(benchmarks.__path__[0])) / "results"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_was_recorded_is_shown(name: str) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert len(BENCHMARKS[name].table(results).splitlines()) > 1


def test_a_missed_bound_is_marked() -> None:
    assert (at_least(2.5, 2.5), at_least(2.49, 2.5)) == ("bound ≥ 2.5", "bound ≥ 2.5, MISSED")
    assert (at_most(0.4, 0.4), at_most(0.41, 0.4)) == ("bound ≤ 0.4", "bound ≤ 0.4, MISSED")
    assert at_most(0.02, 0.01, percent=True) == "bound ≤ 1%, MISSED"
