"""`Conversation`, a training row of text turns, and how it is read from a list of raw turns.

A raw turn has a role and a text: `role` and `content`, or `from` and `value`. Nothing is repaired or guessed: what
cannot be read as a whole raises `RowProblem`. So do images, sound and video: a model that learnt the text alone would
learn to make up what they show. `formats.py` knows which keys of a row hold its turns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from unmask.data.keys import FLAGS, REASONING, RowProblem, is_blank, is_given, json_type, read_object, unread_keys
from unmask.errors import nearest
from unmask.parsing import parse_json

__all__ = ["REASONING", "Conversation", "Message", "RowProblem", "read_content", "read_tools", "read_turns"]

# A role as rows spell it → as chat templates do.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of turns whose text is a call, in JSON
_CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")
_EMPTY = {"user": "nothing is asked", "assistant": "there is nothing to learn"}
_READ = frozenset(("role", "from", "content", "value", "tool_calls", "function_call", *FLAGS, *REASONING))


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text, as written in the row; the texts of several parts one after the other.
        extra: what else chat templates may know: an assistant's `tool_calls`, and keys that are not read here.
        reasoning: what the assistant thought before it answered, "" for nothing.
        supervised: whether the row wants the turn trained on; None = it does not say.
        unread: keys of its parts that nothing reads.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str = ""
    supervised: bool | None = None
    unread: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates take it; reasoning under each name that they may look for."""
        reasoning = dict.fromkeys(REASONING, self.reasoning) if self.reasoning else {}
        return {**self.extra, **reasoning, "role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """One row: at least one turn, at least one of them an answer to be learned.

    Attributes:
        tools: what the assistant may call, as chat templates take it: `{"type": "function", "function": {…}}`.
        unread: keys of the row that say something which nothing reads.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unread: tuple[str, ...] = ()


def read_turns(turns: object, name: str, *, prompt: bool = False, ignore: Collection[str] = ()) -> tuple[Message, ...]:
    """Return the turns of a raw list.

    Args:
        name: what messages call the list.
        prompt: the turns ask; otherwise one of them must be an answer to be learned.
        ignore: keys of turns and of their parts that are left out.

    Raises:
        RowProblem: no list, an unknown role, a content that is no text, an empty question or answer, a
            tool's turn behind no call, a key that changes what the turn says and is not read, contradictions, nothing
            to learn.
    """
    if not isinstance(turns, (list, tuple)):
        raise RowProblem(f"{name!r} must be a list, got {json_type(turns)}")
    if not turns:
        raise RowProblem(f"{name!r} is empty")
    messages = []
    for number, turn in enumerate(turns):
        try:
            messages.append(_read_turn(turn, ignore))
        except RowProblem as problem:
            raise RowProblem(f"{name}[{number}]{problem}", problem.key) from None
        if messages[-1].role == "tool" and (number == 0 or messages[-2].role not in ("assistant", "tool")):
            raise RowProblem(f"{name}[{number}] is what a tool returned, and no assistant's turn before it calls one")
    if not prompt:
        answers = [message.supervised for message in messages if message.role == "assistant"]
        if not answers:
            raise RowProblem(f"{name!r} has no assistant turn, so there is nothing to learn from")
        if answers.count(False) == len(answers):
            raise RowProblem(f"{name!r} leaves every answer out of training, so there is nothing to learn from")
    return tuple(messages)


def read_content(content: object, place: str, ignore: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """Return the text of a content, which may come in parts, and the keys of its parts that nothing reads.

    Raises:
        RowProblem: it is not text, or a part is not.
    """
    if isinstance(content, str):
        _check_characters(content, place)
        return content, ()
    if not isinstance(content, list):
        raise RowProblem(f"{place} must be text, got {json_type(content)}")
    texts, unread = [], {}
    for number, part in enumerate(content):
        here = f"{place}[{number}]"
        if not isinstance(part, dict):
            raise RowProblem(f"{here} must be an object with a type, got {json_type(part)}")
        if part.get("type") != "text":
            raise RowProblem(f"{here} is of type {_shown(part.get('type'))}, and training takes text alone")
        text = part.get("text")
        if not isinstance(text, str):
            raise RowProblem(f"{here}.text must be text, got {json_type(text)}")
        _check_characters(text, f"{here}.text")
        texts.append(text)
        unread.update(dict.fromkeys(unread_keys(part, ("type", "text", *ignore), here)))
    return "".join(texts), tuple(unread)


def read_tools(tools: object, place: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row, a list or its JSON text, each as chat templates take it.

    Raises:
        RowProblem: no list of objects, or no JSON.
    """
    listed = _parsed(tools, place)
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise RowProblem(f"{place} must be a list, got {json_type(listed)}", place)
    read = []
    for number, tool in enumerate(listed):
        tool = _parsed(tool, f"{place}[{number}]")
        if not isinstance(tool, dict) or not is_given(tool.get("function", tool.get("name"))):
            raise RowProblem(f"{place}[{number}] is no object with a function or a name", place)
        read.append(tool if "function" in tool else {"type": "function", "function": tool})
    _check_characters(read, place)
    return tuple(read)


def _read_turn(turn: object, ignore: Collection[str]) -> Message:
    """Return one turn; the text of a RowProblem goes on from the turn's place."""
    if not isinstance(turn, dict):
        raise RowProblem(f" must be an object, got {json_type(turn)}")
    given = {key: value for key, value in turn.items() if value is not None and key not in ignore}
    speaker = _either(given, "role", "from")
    if not isinstance(speaker, str) or speaker not in ROLES:
        key = "from" if "from" in given else "role"
        near = nearest(speaker, ROLES) if isinstance(speaker, str) else ""
        raise RowProblem(f".{key} is {_shown(speaker)}, known are {', '.join(ROLES)}{near}")
    role, content = ROLES[speaker], _either(given, "content", "value")
    key = ".content" if "content" in given or "value" not in given else ".value"
    calls = _read_calls(given, speaker, content) if len(given) > 2 or content is None or speaker in _CALLS else []
    if calls and (content is None or speaker in _CALLS):
        content = ""
    text, unread = read_content(content, key, ignore)
    if role in _EMPTY and not calls and is_blank(text):
        raise RowProblem(f"{key} is empty, so {_EMPTY[role]}")
    if len(given) == 2 and not calls:
        return Message(role, text, unread=unread)
    extra = {name: given[name] for name in unread_keys(given, _READ)}
    _check_characters(extra, "")
    if calls:
        extra["tool_calls"] = calls
    return Message(role, text, extra, _reasoning(given, role), _supervised(given, role), unread)


def _either(given: Mapping[str, Any], one: str, other: str) -> Any:
    """Return what a turn says under one of two names; RowProblem where they differ."""
    if one not in given:
        return given.get(other)
    values = [ROLES.get(v, v) if isinstance(v, str) and one == "role" else v for v in (given[one], given.get(other))]
    if other in given and values[0] != values[1]:
        raise RowProblem(f" has {one!r} and {other!r}, which differ", other)
    return given[one]


def _reasoning(given: Mapping[str, Any], role: str) -> str:
    names = [name for name in REASONING if name in given]
    for name in names:
        if not isinstance(given[name], str):
            raise RowProblem(f".{name} must be text, got {json_type(given[name])}")
        _check_characters(given[name], f".{name}")
        if given[name] and role != "assistant":
            raise RowProblem(f".{name} is given, and only the assistant's turns have reasoning")
        if given[name] != given[names[0]]:
            raise RowProblem(f".{name} differs from its {names[0]}, and both mean the same")
    return given[names[0]] if names else ""


def _supervised(given: Mapping[str, Any], role: str) -> bool | None:
    """Return whether the turn says that it is trained on; None where it does not say."""
    said: dict[str, bool] = {}
    for key in FLAGS:
        if key not in given:
            continue
        value = given[key]
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowProblem(f".{key} is {_shown(value)}, and a turn is learned or not: 0 or 1, false or true", key)
        said[key] = bool(value) is FLAGS[key]
        if said[key] and role != "assistant":
            raise RowProblem(f".{key} is {value!r}, and of a conversation only the assistant's turns are learned", key)
        first = next(iter(said))
        if said[key] is not said[first]:
            raise RowProblem(f" has {first!r} and {key!r}, which contradict each other", key)
    return next(iter(said.values()), None)


def _read_calls(given: Mapping[str, Any], speaker: str, content: object) -> list[dict[str, Any]]:
    """Return the tool calls of a turn, as chat templates take them, however they are written; [] for none."""
    written = {key: given[key] for key in ("tool_calls", "function_call") if is_given(given.get(key))}
    if speaker in _CALLS:
        written["value" if "value" in given else "content"] = content
    if not written:
        return []
    key, value = written.popitem()
    if written or ROLES[speaker] != "assistant":
        why = f"and {next(iter(written))!r}, which are two ways to call" if written else "and only the assistant calls"
        raise RowProblem(f" has {key!r} {why} a tool", key)
    listed = _parsed(value, f".{key}")
    calls = []
    for number, call in enumerate(listed if isinstance(listed, list) else [listed]):
        place = f".{key}[{number}]" if isinstance(listed, list) else f".{key}"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise RowProblem(f"{place} is no call of a function with a name", key)
        for name in {**call, **function}:
            if name not in _CALL_KEYS and is_given(function.get(name, call.get(name))):
                raise RowProblem(f"{place} has {name!r} beside the function's name and arguments", key)
        if call.get("type", "function") != "function":
            raise RowProblem(f"{place}.type is {_shown(call['type'])}, known is function", key)
        arguments = function.get("arguments")
        arguments = _parsed(arguments, f"{place}.arguments") if is_given(arguments) else {}
        if not isinstance(arguments, dict):
            raise RowProblem(f"{place}.arguments must be an object, got {json_type(arguments)}", key)
        about = {k: v for k, v in call.items() if v is not None} if "function" in call else {}
        calls.append({"type": "function", **about, "function": {**function, "arguments": arguments}})
    _check_characters(calls, f".{key}")
    return calls


def _parsed(value: object, place: str) -> Any:
    """Return what JSON text says; what is no text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, read_object, strict=False)
    except ValueError as error:
        raise RowProblem(f"{place} is not JSON ({error})") from None


def _check_characters(value: object, place: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes, in a text or anywhere in a value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str) if value else ""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{place} holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]
