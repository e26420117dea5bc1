from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unmask.errors import ConfigError
from unmask.evaluation.results import Comparison, compare, read_results

ENTRY = {"task": "t", "model": "m", "settings": {}}


def test_a_comparison_counts_answers_and_judgements_that_differ() -> None:
    def record(row: int, correct: bool, *ids: int) -> dict:
        return {"row": row, "correct": correct, "token_ids": list(ids)}

    first = [record(0, True, 1), record(1, True, 1), record(2, False, 1), record(3, False, 1)]
    second = [record(3, False, 2), record(2, True, 2), record(1, False, 2), record(0, True, 1), record(9, True, 1)]
    assert compare(first, second) == Comparison(rows=4, differing=3, gained=1, lost=1)


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"models": 1, "results": []},
        {"models": [5], "results": []},
        {"models": [{"label": [], "fingerprint": {}}], "results": []},
        {"models": [{"label": "m", "fingerprint": "f"}], "results": []},
        {"models": [], "results": [{**ENTRY, "settings": 3}]},
        {"models": [], "results": [{**ENTRY, "seconds": "9"}]},
        {"models": [], "results": [{**ENTRY, "seconds": 9, "timed_rows": {}}]},
    ],
)
def test_earlier_results_of_another_shape_are_refused_by_name(tmp_path: Path, values: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps(values))
    plan: Any = SimpleNamespace(output=tmp_path, checkpoints=[])
    with pytest.raises(ConfigError, match=r"results\.json: not a file of"):
        read_results(plan)
