"""What one training row is once read: a conversation of text turns; and the check that a raw row is one.

Three raw forms are understood: `{"messages": [{"role", "content"}, …]}`, `{"conversations": [{"from", "value"}, …]}`,
and a prompt and a completion column named by the configuration. Nothing is repaired or guessed: a row that is not one
of these raises `RowProblem`, whose text is the end of a sentence that starts with the row's place. So does a row with
an image, sound or video: a model that learnt its text alone would learn to make up what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")
_MESSAGE_ROLES = {role: role for role in ROLES}
FROM_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# The names under which data sets and chat templates know the reasoning of a turn.
REASONING = ("reasoning_content", "reasoning", "thinking")
_MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))


class RowProblem(ValueError):
    """A raw row that is no conversation; the text says why."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user or assistant.
        content: its text, as written in the row; the texts of several parts one after the other.
        extra: further keys of the turn, for chat templates that know them; None values are left out.
        reasoning: what the assistant thought before it answered, "" for nothing.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates take it; reasoning under each name that they may look for."""
        reasoning = dict.fromkeys(REASONING, self.reasoning) if self.reasoning else {}
        return {**self.extra, **reasoning, "role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """One row: at least one turn, at least one of them the assistant's."""

    messages: tuple[Message, ...]


class Columns(NamedTuple):
    """The prompt and completion columns, or (None, None) for rows of messages or conversations."""

    prompt: str | None = None
    completion: str | None = None


def read_conversation(row: object, columns: Columns) -> Conversation:
    """Return the conversation that a raw row holds; RowProblem when it holds none."""
    turns = check_row(row, columns)
    if columns.prompt is not None:
        return Conversation((Message("user", turns[0]), Message("assistant", turns[1])))
    if "messages" in row:  # pyright: ignore[reportOperatorIssue]
        return Conversation(tuple(_message(turn, "role", "content") for turn in turns))
    return Conversation(tuple(_message(turn, "from", "value") for turn in turns))


def check_row(row: object, columns: Columns) -> list[Any]:
    """Return the raw turns of a row (for prompt and completion columns: the two texts), each one checked.

    Raises:
        RowProblem: not an object, no messages, an unknown role, content that is not text, no assistant turn, media.
    """
    if not isinstance(row, dict):
        raise RowProblem(f"a row must be an object, got {_kind(row)}")
    if columns.prompt is not None:
        texts = []
        for column in columns:
            if column not in row:
                raise RowProblem(f"no column {column!r}, the row has {_names(row)}")
            _check_text(row[column], f"column {column!r}")
            texts.append(row[column])
        return texts
    _refuse_media(row, "the row")
    if "messages" in row:
        return _check_turns(row["messages"], "messages", "role", "content", _MESSAGE_ROLES)
    if "conversations" in row:
        return _check_turns(row["conversations"], "conversations", "from", "value", FROM_ROLES)
    raise RowProblem(f"no messages: neither 'messages' nor 'conversations' among its keys ({_names(row)})")


def _check_turns(turns: object, name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Any]:
    if not isinstance(turns, list):
        raise RowProblem(f"{name!r} must be a list, got {_kind(turns)}")
    if not turns:
        raise RowProblem(f"{name!r} is empty")
    found = set()
    for turn in turns:
        try:  # this runs for every row of a file before training starts, so the good case is one line
            found.add(roles[turn[role_key]])
            if turn[text_key].isascii() and len(turn) == 2:
                continue
        except (TypeError, KeyError, AttributeError):
            pass
        _check_turn(turn, f"{name}[{turns.index(turn)}]", role_key, text_key, roles)
    if "assistant" not in found:
        raise RowProblem(f"{name!r} has no assistant turn, so there is nothing to learn from")
    return turns


def _check_turn(turn: object, place: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> None:
    """Say what is wrong with a turn, if anything is."""
    if not isinstance(turn, dict):
        raise RowProblem(f"{place} must be an object, got {_kind(turn)}")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise RowProblem(f"{place}.{role_key} is {_shown(role)}, known are {', '.join(roles)}")
    _refuse_media(turn, place)
    _check_reasoning(turn, role, place)
    content = turn.get(text_key)
    if not isinstance(content, list):
        return _check_text(content, f"{place}.{text_key}")
    for number, part in enumerate(content):
        _check_part(part, f"{place}.{text_key}[{number}]")


def _check_part(part: object, place: str) -> None:
    """Refuse a part of a turn that is no text, as `{"type": "text", "text": …}` is."""
    if not isinstance(part, dict):
        raise RowProblem(f"{place} must be an object with a type, got {_kind(part)}")
    if part.get("type") != "text":
        raise RowProblem(f"{place} is of type {_shown(part.get('type'))}, and training takes text alone")
    _check_text(part.get("text"), f"{place}.text")
    for key, value in part.items():
        if key not in ("type", "text") and _given(value):
            raise RowProblem(f"{place} has {key!r} beside its text, and training takes text alone")


def _check_reasoning(turn: Mapping[str, Any], role: str, place: str) -> None:
    given = [name for name in REASONING if turn.get(name) is not None]
    for name in given:
        _check_text(turn[name], f"{place}.{name}")
        if turn[name] and FROM_ROLES[role] != "assistant":
            raise RowProblem(f"{place}.{name} is given, and only the assistant's turns have reasoning")
        if turn[name] != turn[given[0]]:
            raise RowProblem(f"{place}.{name} differs from its {given[0]}, and both mean the same")


def _refuse_media(holder: Mapping[Any, Any], place: str) -> None:
    for key in sorted(_MEDIA & holder.keys()):
        if _given(holder[key]):
            raise RowProblem(f"{place} has {key!r}, and training takes text alone")


def _given(value: object) -> bool:
    return value is not None and not (isinstance(value, (str, list, dict)) and not value)


def _check_text(value: object, place: str) -> None:
    if not isinstance(value, str):
        raise RowProblem(f"{place} must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{place} holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None


def _message(turn: Mapping[str, Any], role_key: str, text_key: str) -> Message:
    known = (role_key, text_key, *REASONING, *_MEDIA)  # no medium is left: the check was passed
    extra = {k: v for k, v in turn.items() if k not in known and v is not None}
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), "")
    content = turn[text_key]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return Message(FROM_ROLES[turn[role_key]], text, extra, reasoning)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    names[bytes] = "bytes that are not UTF-8"  # others were decoded
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _names(row: Mapping[Any, Any]) -> str:
    names = ", ".join(repr(name) for name in list(row)[:8])
    return names or "it is empty"


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]
