"""Files of prompts: what a line may hold, and how a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.errors import DataError
from unmask.sampling.prompt_rows import read_prompts

CHAT = '{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]}'


def test_a_line_is_a_text_a_chat_or_ids(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "so?", "id": 7}\n\n' + CHAT + '\n{"prompt_ids": [4, 5]}\n')
    assert read_prompts(path) == {
        f"{path}:1": "so?",
        f"{path}:3": [{"role": "user", "content": "1?"}],
        f"{path}:4": [4, 5],
    }
    path.write_text(CHAT)
    assert len(read_prompts(path, infill=True)[f"{path}:1"]) == 2  # the assistant's turn is what has the blanks


def test_ends_of_lines_inside_a_text_are_text(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b\u0085c"}\r\n'.encode())
    assert list(read_prompts(path).values()) == ["a\u2028b\u0085c"]


@pytest.mark.parametrize("infill", [False, True])
def test_prompt_may_be_messages_and_is_then_what_they_are(tmp_path: Path, infill: bool):
    path = tmp_path / "prompts.jsonl"
    path.write_text(CHAT)
    expected = read_prompts(path, infill)
    path.write_text(CHAT.replace("messages", "prompt"))
    assert read_prompts(path, infill) == expected


def test_prompt_may_be_token_ids_as_in_a_record_of_theirs(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"row": 0, "prompt": [4, 5], "text": "so", "token_ids": [6]}')
    assert list(read_prompts(path).values()) == [[4, 5]]


def test_of_messages_and_a_prompt_the_messages_are_asked(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", ' + CHAT[1:])
    assert list(read_prompts(path).values()) == [[{"role": "user", "content": "1?"}]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: a prompt must be an object"),
        ('{"text": "so?"}', "and has none"),
        ('{"prompt": "so?", "prompt_ids": [1]}', "and has prompt and prompt_ids"),
        ('{"prompt": " "}', "a text that is not empty"),
        ('{"prompt_ids": []}', "list of token ids"),
        ('{"prompt_ids": [1, true]}', "list of token ids"),
        ('{"prompt": [4, true]}', "prompt must be a list of token ids"),
        ('{"prompt": []}', "a text that is not empty, or a list"),
        ('{"prompt": [{"role": "user"}]}', "prompt[0].content must be text, got null"),
        ('{"prompt": "hello \\ud83d"}', "prompt holds half a surrogate pair"),
        (
            '{"messages": [{"role": "user", "content": "1?", "x": ["\\ud83d"]}]}',
            "messages[0] holds half a surrogate pair",
        ),
        ('{"messages": [{"role": "user"}]}', "messages[0].content must be text, got null"),
        ('{"prompt": "so?", "max_tokens": 5}', "has 'max_tokens', and settings are those of all prompts"),
        ('{"messages": [{"role": "user", "content": "1?"}], "temperature": 0}', "has 'temperature'"),
        ('{"messages": []}', "messages' is empty"),
        ('{"messages": [{"role": "assistant", "content": "2"}]}', "nothing is asked"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "so?"}\n' + line)
    with pytest.raises(DataError, match="prompts.jsonl:2: ") as error:
        read_prompts(path)
    assert problem in str(error.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="no UTF-8"):
        read_prompts(path)
    with pytest.raises(DataError, match="--input: .*: No such file"):
        read_prompts(tmp_path / "none.jsonl")
    path.write_text('{"prompt_ids": [1]}')
    with pytest.raises(DataError, match="no blanks"):
        read_prompts(path, infill=True)


def test_the_reported_roles_are_read_or_refused_by_line(fixtures: Path, tmp_path: Path):
    human, other, tool, user = (fixtures / "reports" / "prompt_roles.jsonl").read_text().splitlines()
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{human}\n{user}")
    first, second = read_prompts(path).values()
    assert first == second == [{"role": "user", "content": "Ann has 12 nuts and buys 2. How many now?"}]
    for line, problem in (
        (other, r"role is 'User'.*did you mean 'user'"),
        (tool, " is what a tool returned, and no assistant"),
    ):
        path.write_text(f"{user}\n{line}")
        with pytest.raises(DataError, match=rf"prompts.jsonl:2: messages\[0\]\.?{problem}"):
            read_prompts(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [{"role": "user", "content": "1?"}], "images": ["x.png"]}', "the row has 'images'"),
        ('{"prompt": "1?", "documents": ["d"]}', "the row has 'documents'"),
        ('{"prompt": "1?", "chat_template_kwargs": {"a": 1}}', "the row has 'chat_template_kwargs'"),
        ('{"prompt_ids": [1], "system": "s"}', "'system' is given beside token ids"),
        ('{"messages": [{"role": "user", "content": "1?"}], "conversations": [{"from": "human", "value": "1?"}]}',
         "and has messages and conversations"),
        ('{"conversations": [{"from": "bot", "value": "1?"}]}', "conversations[0].from is 'bot'"),
        ('{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "1?"}], "system": "b"}',
         "which differ"),
        ('{"messages": [{"role": "user", "content": "1?"}], "messages": []}', "is given twice"),
    ],
)  # fmt: skip
def test_what_would_change_the_question_is_read_or_refused(tmp_path: Path, line: str, problem: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match="prompts.jsonl:1: ") as error:
        read_prompts(path)
    assert problem in str(error.value)


def test_records_of_answers_and_training_rows_are_prompts(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    record = {
        "row": 0,
        "prompt": "1?",
        "text": "2",
        "token_ids": [3],
        "reasoning": "r",
        "finish_reason": "eos",
        "seed": 1,
    }
    rows = [
        {**record, "sampler": {"steps": 1}, "nfe": 1},
        {"prompt": "1?", "completion": "2", "weight": 1},
        {"prompt": "1?", "chosen": "2", "rejected": "3"},
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2", "weight": 0}],
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1?"}]
    assert list(read_prompts(path).values()) == ["1?", "1?", "1?", chat]
    asked = {"messages": chat, "tools": [{"type": "function", "function": {"name": "add"}}]}
    path.write_text(json.dumps(asked) + "\n" + json.dumps({**record, "prompt": asked}))
    assert list(read_prompts(path).values()) == [asked, asked]
