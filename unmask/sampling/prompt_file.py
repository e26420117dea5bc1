"""Prompts from a JSONL file, one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.sampling.prompts import HALF_A_PAIR

_KEYS = ("prompt", "messages", "prompt_ids")


def read_prompts(path: Path, infill: bool = False) -> dict[str, Any]:
    """Return the prompts of a file by their places, `FILE:LINE`, each as `generate` or `infill` takes it.

    A line holds one of `prompt`, `messages` and `prompt_ids`, or `messages` beside a `prompt`, which is then not looked
    at; neither are other fields. `prompt` is a text, or as the other two: `messages` is a chat whose turns have the
    texts `role` and `content`, and `prompt_ids` token ids. So a record of answers is a prompt, and a training row is
    one that has such `messages` or such a `prompt`. A chat that ends in an assistant's turn is asked for that turn
    again.

    Args:
        path: the file.
        infill: the prompts are texts or chats with blanks, the last turn of a chat included.

    Raises:
        DataError: no such file, an empty one, or a line that is no prompt; names the file and the line.
    """
    try:
        # Not splitlines: a text may hold characters that it takes for ends of lines.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"--input: {path}: {error.strerror or error}; name a JSONL file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--input: {path}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    places = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    prompts = {place: _prompt(place, line, infill) for place, line in places.items()}
    if not prompts:
        raise DataError(f"--input: {path} holds no prompt; write one JSON object a line, such as " + '{"prompt": "…"}')
    return prompts


def _prompt(where: str, line: str, infill: bool) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); write one object a line") from None
    found = [key for key in _KEYS if isinstance(row, dict) and key in row]
    if found == ["prompt", "messages"]:  # a training row's chat says more than the text beside it
        found = ["messages"]
    if len(found) != 1:
        raise DataError(f"{where}: needs exactly one of {', '.join(_KEYS)}, and has {' and '.join(found) or 'none'}")
    (key,) = found
    value = row[key]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key} holds {HALF_A_PAIR}; mend the text") from None
    if key == "messages" or (key == "prompt" and _holds(value, dict)):
        return _chat(where, key, value, infill)
    if key == "prompt_ids" or (key == "prompt" and _holds(value, int)):
        return _ids(where, key, value, infill)
    if not (isinstance(value, str) and value.strip()):
        raise DataError(f"{where}: prompt must be a text that is not empty, or a list of messages or of token ids")
    return value


def _holds(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], kind)


def _chat(where: str, key: str, turns: Any, infill: bool) -> list[dict[str, Any]]:
    if not _holds(turns, dict) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise DataError(f"{where}: {key} must be a list of objects with the texts role and content")
    if infill or turns[-1]["role"] != "assistant":
        return turns
    if len(turns) == 1:
        raise DataError(f"{where}: nothing is asked before the assistant's turn; add a user turn")
    return turns[:-1]


def _ids(where: str, key: str, ids: Any, infill: bool) -> list[int]:
    if infill:
        raise DataError(f"{where}: token ids have no blanks to fill; give a text or messages")
    if not _holds(ids, int) or not all(type(token) is int and token >= 0 for token in ids):
        raise DataError(f"{where}: {key} must be a list of token ids that is not empty")
    return ids
