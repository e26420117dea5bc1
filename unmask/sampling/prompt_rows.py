"""Reads prompts from rows, of a JSONL file or given in Python, as training reads rows, but without an answer.

A row holds one of KEYS; `messages` or `conversations` may stand beside a `prompt`, which then is not looked at. The
row's own system text and tools are part of what is asked. What belongs to an answer is not looked at (`completion`,
`weight`, the fields of a record that `unmask generate` wrote), nor is what means nothing that is known (`id`). Any
other key that would change what is asked or how it is answered is refused. So records of answers and training rows are
prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.data.conversation import ROLES, Message, read_content, read_tools, read_turns
from unmask.data.formats import with_system
from unmask.data.keys import FLAGS, REASONING, SYSTEM, RowProblem, is_blank, is_given, read_object, unread_keys
from unmask.errors import DataError
from unmask.parsing import ParseProblem, parse_json

KEYS = ("messages", "conversations", "prompt", "prompt_ids")
_ANSWERS = (
    *FLAGS, *REASONING, "completion", "completions", "output", "response", "chosen", "rejected", "label", "labels",
    "text", "token_ids", "completion_ids", "sample_weight", "loss_scale",
)  # fmt: skip

# What requests of other tools set for one prompt; here a sampler's settings are those of all prompts.
_OPTIONS = (
    "temperature", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_gen_toks", "max_length", "top_p",
    "top_k", "min_p", "stop", "stop_sequences", "do_sample", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "response_format", "generation_kwargs", "sampling_params",
)  # fmt: skip


def is_row(value: Any) -> bool:
    """Say whether a value is a row, rather than a turn of a chat."""
    return isinstance(value, Mapping) and not ("role" in value or "from" in value)


def read_row(row: object, infill: bool = False) -> Any:
    """Return what a row asks, as `generate` takes it: a text, token ids, turns, or turns and tools as a row.

    A chat that ends in an assistant's turn is asked for that turn again, unless it has blanks to fill (`infill`).

    Raises:
        RowProblem: the row asks nothing, or not in one way.
    """
    if not isinstance(row, Mapping):
        raise RowProblem("a prompt must be an object")
    keys = [key for key in KEYS if row.get(key) is not None]
    if "prompt" in keys and len(keys) > 1 and "prompt_ids" not in keys:  # a training row's chat says more than that
        keys.remove("prompt")
    if len(keys) != 1:
        raise RowProblem(f"needs exactly one of {', '.join(KEYS)}, and has {' and '.join(keys) or 'none'}")
    (key,) = keys
    value = row[key]
    given = {name: each for name, each in row.items() if is_given(each)}
    unread_keys(given, (*KEYS, *SYSTEM, *_ANSWERS, "tools"), "the row")
    option = next((name for name in given if name in _OPTIONS), None)
    if option is not None:
        raise RowProblem(
            f"has {option!r}, and settings are those of all prompts of a run; set it there if the sampler has it, and "
            "take it out of the row"
        )
    about = [name for name in (*SYSTEM, "tools") if name in given]
    if key == "prompt" and is_row(value) and not about:
        return read_row(value, infill)  # a chat with tools, as a record of an answer has it
    if key == "prompt_ids" or (key == "prompt" and _begins_with(value, int)):
        if about:
            raise RowProblem(f"{about[0]!r} is given beside token ids, which have no turns; write it into the ids")
        return _read_ids(key, value, infill)
    if key == "prompt" and isinstance(value, str) and not is_blank(value):
        text = read_content(value, key)[0]
        if not about:
            return text
        messages: tuple[Message, ...] = (Message("user", text),)
    elif key == "prompt" and not _begins_with(value, dict):
        raise RowProblem("prompt must be a text that is not empty, or a list of messages or of token ids")
    else:
        messages = _read_chat(key, value, infill)
    turns = [turn.as_dict() for turn in with_system(messages, given, ())]
    return {"messages": turns, "tools": list(read_tools(given["tools"], "tools"))} if "tools" in given else turns


def _read_chat(key: str, turns: Any, infill: bool) -> tuple[Message, ...]:
    last = turns[-1] if isinstance(turns, (list, tuple)) and turns else None
    if not infill and isinstance(last, Mapping) and ROLES.get(str(last.get("role", last.get("from")))) == "assistant":
        turns = turns[:-1]
        if not turns:
            raise RowProblem("nothing is asked before the assistant's turn; add a user turn")
    return read_turns(turns, key, prompt=True)


def _read_ids(key: str, ids: Any, infill: bool) -> list[int]:
    if infill:
        raise RowProblem("token ids have no blanks to fill; give a text or messages")
    if not _begins_with(ids, int) or not all(type(token) is int and token >= 0 for token in ids):
        raise RowProblem(f"{key} must be a list of token ids that is not empty")
    return list(ids)


def _begins_with(value: Any, item: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], item)


def read_prompts(path: Path, infill: bool = False) -> dict[str, Any]:
    """Return the prompts of a file by their labels, `FILE:LINE`, each as `generate` or `infill` takes it.

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
    labelled = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    prompts = {label: _read_line(label, line, infill) for label, line in labelled.items()}
    if not prompts:
        raise DataError(f"--input: {path} holds no prompt; write one JSON object a line, such as " + '{"prompt": "…"}')
    return prompts


def _read_line(label: str, line: str, infill: bool) -> Any:
    try:
        return read_row(parse_json(line, read_object, strict=False), infill)
    except RowProblem as problem:
        raise DataError(f"{label}: {problem}; mend the line") from None
    except ParseProblem as error:
        raise DataError(f"{label}: not JSON ({error}); write one object a line") from None
