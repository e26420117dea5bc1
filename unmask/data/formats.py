"""The formats of raw rows: which keys hold the conversation, and how each is read whole or refused.

`FORMATS` is the table. A row has the first format whose keys it has. What else it says is read (a system turn, tools),
says the same once more, is refused since it changes what the row teaches (`keys.py`), or is left out and listed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from unmask.data.conversation import Conversation, Message, read_content, read_tools, read_turns
from unmask.data.keys import REASONS, SYSTEM, RowProblem, is_blank, is_given, kind_of, unread_keys


@dataclass(frozen=True)
class Format:
    """How rows of one format hold a conversation.

    Attributes:
        keys: the key of a list of turns; or those of a question and its answer, each a text or a list of turns.
        further: keys that it reads besides: `input` goes on below the question, `history` holds earlier pairs of
            question and answer.
    """

    keys: tuple[str, ...]
    further: tuple[str, ...] = ()


FORMATS = (
    Format(("messages",)),
    Format(("conversations",)),
    Format(("prompt", "completion")),
    Format(("instruction", "output"), ("input", "history")),
    Format(("query", "response"), ("history",)),
)
_EVERY = (*SYSTEM, "tools")  # keys of a row that every format reads
_ASKS = ("prompt", "instruction", "input", "query")  # keys that may repeat a question of the turns
_ANSWERS = ("completion", "output", "response")
_MEANING = frozenset(REASONS)
_PLAIN_ROLES = ("user", "assistant", "human", "gpt", "system")
_PLAIN_ANSWERS = ("assistant", "gpt")


class Columns(NamedTuple):
    """Which columns hold the question and the answer of a row, None for what `FORMATS` says; and keys to leave out."""

    prompt: str | None = None
    completion: str | None = None
    ignore: Collection[str] = frozenset()

    def format_of(self, keys: Collection[str]) -> Format | None:
        """Return the format of a row that has these keys, None if none of them."""
        formats = FORMATS
        if self.prompt is not None and self.completion is not None:
            named = (self.prompt, self.completion)
            formats = (next((known for known in FORMATS if known.keys == named), Format(named)),)
        for known in formats:
            if all(map(keys.__contains__, known.keys)):
                return known
        return None


NO_COLUMNS = Columns()


def read_conversation(row: object, columns: Columns = NO_COLUMNS) -> Conversation:
    """Return the conversation that a raw row holds.

    Raises:
        RowProblem: not an object, no format or a turn that is none, contradictions, a key that changes what the row
            teaches and is not read, nothing to learn.
    """
    if not isinstance(row, dict):
        raise RowProblem(f"a row must be an object, got {kind_of(row)}")
    given = {key: value for key, value in row.items() if key not in columns.ignore and is_given(value)}
    form = columns.format_of(given) or columns.format_of([key for key in row if key not in columns.ignore])
    if form is None:
        raise RowProblem(_no_format(row, columns))
    if len(form.keys) == 1:
        messages = read_turns(row[form.keys[0]], form.keys[0], ignore=columns.ignore)
    else:
        messages = _exchanges(row, given, form, columns.ignore)
    further = {key: value for key, value in given.items() if key not in form.keys and key not in form.further}
    if not further:
        return Conversation(messages)
    messages = with_system(messages, given, columns.ignore)
    tools = read_tools(given["tools"], "tools") if "tools" in given else ()
    read = {key for key, value in further.items() if key in _EVERY or _repeats(key, value, messages)}
    whole = tuple(key for key, value in further.items() if key not in read and _holds(key, value, messages))
    return Conversation(messages, tools, (*whole, *unread_keys(further, {*read, *whole}, "the row")))


def _exchanges(row: Mapping[str, Any], given: Mapping[str, Any], form: Format, ignore: Any) -> tuple[Message, ...]:
    """Return the turns of a row of questions and answers."""
    messages: list[Message] = []
    if "history" in form.further and "history" in given:
        messages += _history(given["history"])
    asks, answers = form.keys
    if isinstance(row[asks], list) and "input" not in form.further:
        # A list of turns that the answer goes on from: what the assistant says in it is context.
        asked = read_turns(row[asks], asks, prompt=True, ignore=ignore)
        messages += (
            replace(turn, supervised=False) if turn.role == "assistant" and turn.supervised is None else turn
            for turn in asked
        )
    else:
        question = _text(row[asks], asks)
        if "input" in form.further and "input" in given:
            more = _text(given["input"], "input")
            question = more if is_blank(question) else f"{question}\n{more}"
        messages.append(_turn("user", question, asks))
    if isinstance(row[answers], list):
        messages += read_turns(row[answers], answers, ignore=ignore)
    else:
        messages.append(_turn("assistant", _text(row[answers], answers), answers))
    return tuple(messages)


def _history(history: object) -> list[Message]:
    """Return the turns of earlier pairs of question and answer."""
    messages = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        place = f"history[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowProblem(f"{place} must be a pair of question and answer, got {kind_of(pair)}", "history")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_turn(role, _text(text, place), place))
    return messages


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"column {name!r} must be text, got {kind_of(value)}")
    return read_content(value, f"column {name!r}")[0]


def _turn(role: str, text: str, name: str) -> Message:
    if is_blank(text):
        why = "nothing is asked" if role == "user" else "there is nothing to learn"
        raise RowProblem(f"column {name!r} is empty, so {why}")
    return Message(role, text)


def with_system(messages: tuple[Message, ...], given: Mapping[str, Any], ignore: Any) -> tuple[Message, ...]:
    """Put the row's own system text before its turns, unless a system turn says it already."""
    said = {key: read_content(given[key], key, ignore) for key in SYSTEM if key in given}
    if not said:
        return messages
    turns = {turn.content.strip() for turn in messages if turn.role == "system"}
    first, *others = said
    if len({*turns, *(text.strip() for text, _ in said.values())}) > 1:
        other = repr(others[0]) if others else "a system turn"
        raise RowProblem(f"the row has {first!r} and {other}, which differ", first)
    text, unread = said[first]
    return messages if turns else (Message("system", text, unread=unread), *messages)


def _repeats(key: str, value: object, messages: tuple[Message, ...]) -> bool:
    """Say whether a key only says again what the turns or one of them say, as the `prompt` of many data sets does."""
    if isinstance(value, list) and len(messages) == len(value) and key in ("messages", "conversations"):
        return read_turns(value, key) == messages
    if not isinstance(value, str):
        return False
    role = "user" if key in _ASKS else "assistant" if key in _ANSWERS else None
    return any(turn.role == role and turn.content.strip() == value.strip() for turn in messages)


def _holds(key: str, value: object, messages: tuple[Message, ...]) -> bool:
    """Say whether a text holds every line of the turns: somebody rendered them, and the turns say enough."""
    if key not in (*_ASKS, "text") or not isinstance(value, str):
        return False
    return all(line.strip() in value for turn in messages for line in turn.content.splitlines())


def _no_format(row: Mapping[Any, Any], columns: Columns) -> str:
    names = ", ".join(repr(name) for name in list(row)[:8]) or "it is empty"
    if columns.prompt is not None:
        missing = next(name for name in columns[:2] if name not in row or name in columns.ignore)
        return f"no column {missing!r}, the row has {names}"
    known = " | ".join(", ".join(form.keys) for form in FORMATS)
    return f"no messages: among its keys ({names}) are none of {known}"


def check_row(row: object, columns: Columns = NO_COLUMNS) -> None:
    """Raise what `read_conversation` raises; most rows are known to be whole at a glance."""
    if not is_plain(row, columns):
        read_conversation(row, columns)


def is_plain(row: object, columns: Columns = NO_COLUMNS) -> bool:
    """Say whether all that a row means is in roles and texts that can be seen, as in most rows of large files.

    That is much quicker than reading it, and opening a file asks for every row.
    """
    if type(row) is not dict or columns.ignore:
        return False
    if columns.prompt is not None:
        names = columns[:2]
    else:
        names = ("messages",) if "messages" in row else ("conversations",)
    if len(row) > len(names) and not _MEANING.isdisjoint(row.keys() - set(names)):
        return False
    if len(names) == 2:
        return _is_plain(row.get(names[0])) and _is_plain(row.get(names[1]))
    turns = row.get(names[0])
    if type(turns) is not list:
        return False
    role_key, text_key = ("role", "content") if names[0] == "messages" else ("from", "value")
    role = None
    for turn in turns:
        if type(turn) is not dict or len(turn) != 2 or not _is_plain(turn.get(text_key)):
            return False
        role = turn.get(role_key)
        if role not in _PLAIN_ROLES:
            return False
    return role in _PLAIN_ANSWERS


def _is_plain(text: object) -> bool:
    if type(text) is not str or not "!" <= text[:1] <= "~":
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
