from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.errors import ConfigError
from unmask.evaluation.records import (
    Comparison,
    append_records,
    compare,
    grown_identity,
    read_records,
    resize_records,
    resume_records,
)

WHO = {"task": "gsm8k", "sampler": {"steps": 8, "cache": "none"}, "seed": 42}
UNITS = [(3, 1), (0, 2)]


def rows(*numbers: int) -> list[dict]:
    return [{"row": number, "text": f"answer {number}"} for number in numbers]


def test_what_was_written_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.jsonl"
    assert resume_records(path, WHO, UNITS) == []
    append_records(path, rows(3, 1))
    assert resume_records(path, WHO, UNITS) == rows(3, 1)
    append_records(path, rows(0, 2))
    assert read_records(path) == (WHO, rows(3, 1, 0, 2))


@pytest.mark.parametrize(
    "tail", ['{"row": 0, "text": "answer 0"}\n', '{"row": 0, "te', '{"row": 0, "text": "answer 0"}']
)
def test_a_unit_that_was_cut_short_is_done_again_whole(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "a.jsonl"
    resume_records(path, WHO, UNITS)
    append_records(path, rows(3, 1))
    before = path.read_bytes()
    with path.open("a") as file:
        file.write(tail)
    assert resume_records(path, WHO, UNITS) == rows(3, 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, r"a.jsonl: holds another evaluation \(seed 42, not 1\)"),
        ({"sampler": {"steps": 9, "cache": "none"}}, r"\(sampler.steps 8, not 9\); choose another --output"),
    ],
)
def test_the_file_of_another_evaluation_is_refused_and_stays(tmp_path: Path, change: dict, said: str) -> None:
    path = tmp_path / "a.jsonl"
    resume_records(path, WHO, UNITS)
    append_records(path, rows(3, 1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        resume_records(path, WHO | change, UNITS)
    assert path.read_bytes() == before


def test_a_file_without_records_is_of_no_evaluation_yet(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    resume_records(path, WHO, UNITS)
    assert resume_records(path, WHO | {"seed": 1}, UNITS) == []
    assert read_records(path) == (WHO | {"seed": 1}, [])


def first(rows: int) -> dict:
    return WHO | {"rows": rows, "questions": f"of the first {rows}"}


def sizes(*rows: int) -> list[list]:
    return [[number, f"of the first {number}"] for number in rows]


def test_an_evaluation_of_more_rows_goes_on_from_one_of_fewer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert resize_records(path, first, 2) == [] and not path.exists()
    resume_records(path, first(2), [(1, 0)])
    assert resize_records(path, first, 4) == []  # there is nothing to go on from
    append_records(path, rows(1, 0))
    before = path.read_bytes()
    assert resize_records(path, first, 2) == [] and path.read_bytes() == before
    assert resize_records(path, first, 4) == sizes(2)
    assert read_records(path) == (first(4) | {"grown_from": sizes(2)}, rows(1, 0))
    assert resize_records(path, first, 4) == sizes(2)
    assert resize_records(path, first, 9) == sizes(2, 4)
    assert resume_records(path, grown_identity(first(9), sizes(2, 4)), [(1, 0), (3, 2)]) == rows(1, 0)


def test_growth_can_be_undone_until_a_row_beyond_it_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    resume_records(path, first(2), [(1, 0)])
    append_records(path, rows(1, 0))
    before = path.read_bytes()
    for more in ([9], [4, 9]):
        for wanted in more:
            resize_records(path, first, wanted)
        assert resize_records(path, first, 2) == [] and path.read_bytes() == before
    resize_records(path, first, 9)
    assert resize_records(path, first, 5) == sizes(2)  # back to 2, and on to 5
    assert read_records(path)[0] == first(5) | {"grown_from": sizes(2)}
    append_records(path, rows(4))
    after = path.read_bytes()
    with pytest.raises(ConfigError, match="holds answers beyond the first 2 of its 5 rows; give --limit 5 or more"):
        resize_records(path, first, 2)
    assert path.read_bytes() == after


def test_growth_is_undone_for_the_same_questions_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    resume_records(path, first(2), [(1, 0)])
    append_records(path, rows(1, 0))
    resize_records(path, first, 9)
    before = path.read_bytes()
    for change, said in (({"questions": "others"}, "questions of the first 2, not others"), ({"seed": 1}, "seed 42")):
        with pytest.raises(ConfigError, match=said):
            resize_records(path, lambda rows, change=change: first(rows) | change, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("wanted", "change", "said"),
    [
        (2, {}, r"is of 4 rows, and 2 are asked for: fewer of the same, or other data; for the same --data give"),
        (2, {"questions": "others"}, r"fewer of the same, or other data; .*--limit 4 or more, or choose another --o"),
        (2, {"seed": 1}, r"holds another evaluation \(seed 42, not 1\)"),
        (9, {"seed": 1}, r"holds another evaluation \(seed 42, not 1\)"),
        (9, {"questions": "others"}, r"holds another evaluation \(questions of the first 4, not others\)"),
    ],
)
def test_fewer_rows_and_other_rows_are_refused_and_the_file_stays(
    tmp_path: Path, wanted: int, change: dict, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    resume_records(path, first(4), [])
    append_records(path, rows(3, 1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        resize_records(path, lambda rows: first(rows) | change, wanted)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["notes\n", json.dumps({"row": 1}) + "\n", "\n"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no file of this kind: evaluation"):
        resume_records(path, WHO, UNITS)
    assert path.read_text() == text


def test_a_comparison_counts_answers_and_judgements_that_differ() -> None:
    def record(row: int, correct: bool, *ids: int) -> dict:
        return {"row": row, "correct": correct, "token_ids": list(ids)}

    first = [record(0, True, 1), record(1, True, 1), record(2, False, 1), record(3, False, 1)]
    second = [record(3, False, 2), record(2, True, 2), record(1, False, 2), record(0, True, 1), record(9, True, 1)]
    assert compare(first, second) == Comparison(rows=4, differing=3, gained=1, lost=1)
