"""Files of prompts: what a line may hold, and how a bad one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.errors import DataError
from unmask.sampling.prompts import read_prompts

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
        ("[]", ":2: needs exactly one of prompt, messages, prompt_ids, and has none"),
        ('{"text": "so?"}', "and has none"),
        ('{"prompt": "so?", "prompt_ids": [1]}', "and has prompt and prompt_ids"),
        ('{"prompt": " "}', "a text that is not empty"),
        ('{"prompt_ids": []}', "list of token ids"),
        ('{"prompt_ids": [1, true]}', "list of token ids"),
        ('{"prompt": [4, true]}', "prompt must be a list of token ids"),
        ('{"prompt": []}', "a text that is not empty, or a list"),
        ('{"prompt": [{"role": "user"}]}', "prompt must be a list of objects with the texts role and content"),
        ('{"prompt": "hello \\ud83d"}', "prompt holds half a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "1?", "x": ["\\ud83d"]}]}', "messages holds half a surrogate pair"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": []}', "role and content"),
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
