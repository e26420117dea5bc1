"""Prompts from a JSONL file, one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.errors import DataError

_KEYS = ("prompt", "messages", "prompt_ids")


def read_prompts(path: Path, infill: bool = False) -> dict[str, Any]:
    """Return the prompts of a file by their places, `FILE:LINE`, each as `generate` or `infill` takes it.

    A line holds one of `prompt` (a text), `messages` (a chat) or `prompt_ids` (token ids); other fields are not looked
    at, so that a file of answers or of training rows is a file of prompts. A chat that ends in an assistant's turn is
    asked for that turn again.

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
    if len(found) != 1:
        raise DataError(f"{where}: needs exactly one of {', '.join(_KEYS)}, and has {' and '.join(found) or 'none'}")
    value = row[found[0]]
    if found[0] == "prompt" and not (isinstance(value, str) and value.strip()):
        raise DataError(f"{where}: prompt must be a text that is not empty")
    if found[0] == "prompt_ids":
        if infill:
            raise DataError(f"{where}: prompt_ids have no blanks to fill; give prompt or messages")
        if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
            raise DataError(f"{where}: prompt_ids must be a list of token ids that is not empty")
    if found[0] == "messages":
        turns = value if isinstance(value, list) else []
        if not turns or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        ):
            raise DataError(f"{where}: messages must be a list of objects with the texts role and content")
        if not infill and turns[-1]["role"] == "assistant":
            value = turns[:-1]
            if not value:
                raise DataError(f"{where}: nothing is asked before the assistant's turn; add a user turn")
    return value
