"""What one training row is once read: a conversation of text turns; and the check that a raw row is one.

Three raw forms are understood: `{"messages": [{"role", "content"}, …]}`, `{"conversations": [{"from", "value"}, …]}`,
and a prompt and a completion column named by the configuration. Nothing is repaired or guessed: a row that is not one
of these raises `RowProblem`, whose text is the end of a sentence that starts with the row's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")
_MESSAGE_ROLES = {role: role for role in ROLES}
FROM_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class RowProblem(ValueError):
    """A raw row that is no conversation; the text says why."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user or assistant.
        content: its text, as written in the row.
        extra: further keys of the turn, for chat templates that know them; None values are left out.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {**self.extra, "role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """One row: at least one turn, at least one of them the assistant's."""

    messages: tuple[Message, ...]


class Columns(NamedTuple):
    """The prompt and completion columns, or (None, None) for rows of messages or conversations."""

    prompt: str | None = None
    completion: str | None = None


def read_conversation(row: object, columns: Columns) -> Conversation:
    """Return the conversation that a raw row holds.

    Raises:
        RowProblem: when it holds none.
    """
    turns = check_row(row, columns)
    if columns.prompt is not None:
        return Conversation((Message("user", turns[0]), Message("assistant", turns[1])))
    if "messages" in row:  # pyright: ignore[reportOperatorIssue]
        return Conversation(tuple(_message(turn, "role", "content") for turn in turns))
    return Conversation(tuple(_message(turn, "from", "value") for turn in turns))


def check_row(row: object, columns: Columns) -> list[Any]:
    """Return the raw turns of a row (for prompt and completion columns: the two texts), each one checked.

    Raises:
        RowProblem: not an object, no messages, an unknown role, content that is not text, no assistant turn.
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
            if turn[text_key].isascii():
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
    _check_text(turn.get(text_key), f"{place}.{text_key}")


def _check_text(value: object, place: str) -> None:
    if not isinstance(value, str):
        raise RowProblem(f"{place} must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{place} holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None


def _message(turn: Mapping[str, Any], role_key: str, text_key: str) -> Message:
    extra = {k: v for k, v in turn.items() if k not in (role_key, text_key) and v is not None}
    return Message(FROM_ROLES[turn[role_key]], turn[text_key], extra)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _names(row: Mapping[Any, Any]) -> str:
    names = ", ".join(repr(name) for name in list(row)[:8])
    return names or "it is empty"


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]
