"""The file of an interruptible job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unmask.errors import ConfigError
from unmask.report.resumable import Kind, append_records, first_difference, read_records, resume_records

WHO = {"task": "gsm8k", "sampler": {"steps": 8, "cache": "none"}, "seed": 42}
UNITS = [(3, 1), (0, 2)]
KIND = Kind("evaluation", lambda record: isinstance(record["text"], str))


def resume(path: Path, **change: object) -> list[dict]:
    return resume_records(path, KIND, WHO | change, UNITS)


def rows(*numbers: int) -> list[dict]:
    return [{"row": number, "text": f"answer {number}"} for number in numbers]


def test_what_was_written_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.jsonl"
    assert resume(path) == []
    append_records(path, rows(3, 1))
    assert resume(path) == rows(3, 1)
    append_records(path, rows(0, 2))
    assert read_records(path, KIND) == (WHO, rows(3, 1, 0, 2))


def test_a_name_that_is_not_utf8_is_written_and_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"lat\xe9")
    resume(tmp_path / "a.jsonl", task=name)
    append_records(tmp_path / "a.jsonl", [{"row": 3, "text": name}, {"row": 1, "text": "é"}])
    assert [record["text"] for record in resume(tmp_path / "a.jsonl", task=name)] == [name, "é"]


@pytest.mark.parametrize(
    "tail", ['{"row": 0, "text": "answer 0"}\n', '{"row": 0, "te', '{"row": 0, "text": "answer 0"}']
)
def test_a_unit_that_was_cut_short_is_done_again_whole(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "a.jsonl"
    resume(path)
    append_records(path, rows(3, 1))
    before = path.read_bytes()
    with path.open("a") as file:
        file.write(tail)
    assert resume(path) == rows(3, 1)
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
    resume(path)
    append_records(path, rows(3, 1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        resume(path, **change)
    assert path.read_bytes() == before


def test_a_file_without_records_is_of_no_evaluation_yet(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    resume(path)
    assert resume(path, seed=1) == []
    assert read_records(path, KIND) == (WHO | {"seed": 1}, [])


@pytest.mark.parametrize("text", ["notes\n", json.dumps({"row": 1}) + "\n", "\n"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no file of this kind: evaluation"):
        resume(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "line", ["5", "[]", '{"row": "1"}', '{"row": 1}', '{"row": 1, "text": 2}', "{", "\xff", "[" * 9999]
)
def test_a_line_that_is_no_record_is_named_and_the_file_stays(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    resume(path)
    append_records(path, rows(3))
    with path.open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    append_records(path, rows(1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: no record of this kind: evaluation; remove the line"):
        resume(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("found", "said"), [({"a": {"b": None}}, None), ({"a": {"b": 1}}, "a.b 1, not none"), ({"a": 1}, "a 1, not {}")]
)
def test_a_null_is_as_good_as_nothing(found: dict, said: str | None) -> None:
    assert first_difference(found, {"a": {}}) == said
