from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.config.data import DatasetConfig
from unmask.data.conversation import Message
from unmask.data.formats import Columns
from unmask.data.sources import open_rows
from unmask.errors import DataError
from unmask.evaluation.tasks import as_text, questions_of, read_questions, refuse_leaks, with_shots

CHAT = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"},
]}  # fmt: skip


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_last_assistant_turn_of_a_chat_is_the_answer(tmp_path: Path) -> None:
    question = read_questions(write(tmp_path, CHAT))[0]
    assert [turn.content for turn in question.prompt] == ["Be brief.", "1+1?", "2", "2+2?"]
    assert question.reference == "4"
    assert question.label.endswith("rows.jsonl:1")


@pytest.mark.parametrize("names", [("question", "answer"), ("prompt", "completion"), ("problem", "solution")])
def test_columns_are_known_by_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    row = dict(zip(names, ("1+1?", "2"), strict=True))
    question = read_questions(write(tmp_path, row))[0]
    assert (question.prompt, question.reference) == ((Message("user", "1+1?"),), "2")


def test_other_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "1+1?", "a": "2", "answer": "no", "question": "no"})
    assert read_questions(path, columns=Columns("q", "a"))[0].reference == "2"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (({"question": "1+1?", "answer": "2"}, {"query": "x"}), r"rows.jsonl:2: neither messages nor .* has 'query'"),
        (({"question": "1+1?", "answer": 2},), r"rows.jsonl:1: column 'answer' must be text"),
        (({"question": "1+1?", "answer": " "},), r"rows.jsonl:1: column 'answer' is empty"),
        (({"messages": [{"role": "assistant", "content": "2"}]},), "nothing is asked before"),
        ((), "has no rows"),
    ],
)
def test_a_row_without_question_and_answer_is_refused_with_its_line(tmp_path: Path, rows: tuple, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_questions(write(tmp_path, *rows))


def test_every_format_of_training_rows_asks(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Reverse.", "input": "ab", "output": "ba", "system": "Be brief."},
        {"system": "Be brief.", "prompt": [{"role": "user", "content": "Reverse.\nab"}], "completion": "ba"},
    ]
    for question in read_questions(write(tmp_path, *rows)):
        assert [turn.content for turn in question.prompt] == ["Be brief.", "Reverse.\nab"]
        assert question.reference == "ba"


def test_an_answer_that_is_not_learned_is_no_reference(tmp_path: Path) -> None:
    turns = [*CHAT["messages"][:-1], {"role": "assistant", "content": "5", "weight": 0}]
    assert read_questions(write(tmp_path, {"messages": turns}))[0].reference == "2"


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": ""}]}, r"messages\[5\].content is empty"),
        ({**CHAT, "tools": [{"name": "add"}]}, "the row has 'tools', .* --ignore-keys tools"),
        ({**CHAT, "rejected": "5"}, "the row has 'rejected', .* --ignore-keys rejected"),
        (
            {"messages": [*CHAT["messages"][:-1], {"role": "assistant", "tool_calls": [{"name": "add"}]}]},
            "its answer is a call of a tool, without text",
        ),
    ],
)
def test_rows_that_training_refuses_or_that_have_no_text_to_match_are_refused(tmp_path: Path, row: dict, said: str):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: {said}"):
        read_questions(write(tmp_path, row))


def test_questions_of_a_table_are_left_out_where_its_malformed_rows_are(tmp_path: Path) -> None:
    call = {"messages": [*CHAT["messages"][:-1], {"role": "assistant", "tool_calls": [{"name": "add"}]}]}
    rows = open_rows(DatasetConfig(str(write(tmp_path, CHAT, call))))
    with pytest.raises(DataError, match="rows.jsonl:2: its answer is a call of a tool"):
        questions_of(rows, None)
    assert [question.reference for question in questions_of(rows, None, skip_malformed=True)] == ["4"]


def test_a_file_that_is_no_json_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=r"--data: .* cannot be read"):
        read_questions(path)
    path.write_text("{'a'\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON"):
        read_questions(path)
    path.write_text('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON"):
        read_questions(path)
    path.write_text('{"question": "a", "answer": "1", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: the key 'answer' is given twice"):
        read_questions(path)


def test_a_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}, {"broken": 1})
    assert [question.reference for question in read_questions(path, 2)] == ["1", "2"]


def test_worked_examples_are_earlier_turns_after_the_system_turn(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path, CHAT))
    shots = read_questions(write(tmp_path, {"question": "3+3?", "answer": "6"}))
    turns = with_shots(questions, shots)[0].prompt
    assert [turn.content for turn in turns] == ["Be brief.", "3+3?", "6", "1+1?", "2", "2+2?"]
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_literal_text_holds_the_examples_before_the_question(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path, {"question": "1+1?", "answer": "2"}))
    shots = read_questions(write(tmp_path, {"question": "3+3?", "answer": "6"}))
    prompt = as_text(questions, shots, "Question: ", "\nAnswer:")[0].prompt
    assert prompt == "Question: 3+3?\nAnswer: 6\n\nQuestion: 1+1?\nAnswer:"


def test_a_question_that_is_an_example_too_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n')
    questions = read_questions(path)
    refuse_leaks(questions[:1], questions[1:])
    with pytest.raises(DataError, match=r"rows.jsonl:2 is the question of .*rows.jsonl:2 too"):
        refuse_leaks(questions, questions[1:])
