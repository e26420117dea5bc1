"""Reads a raw row as a conversation, by the data formats that people use, or refuses it.

`FORMATS` is the table; a row has the first format whose keys it has. Each other key is read in every format (`system`,
`tools`), repeats what the turns say, is refused because it changes what the row teaches (`keys.py`), or is left out and
named to the user.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from unmask.data.conversation import Conversation, Message, read_content, read_tools, read_turns
from unmask.data.keys import REFUSED_KEYS, SYSTEM, RowProblem, is_blank, is_given, json_type, unread_keys


@dataclass(frozen=True)
class Format:
    """How rows of one format hold a conversation.

    Attributes:
        keys: the key of a list of turns; or those of a question and of its answer, each a text or a list of turns.
        optional: `input` is appended to the question, on a line of its own; `history` holds earlier pairs of question
            and answer.
    """

    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = (
    Format(("messages",)),
    Format(("conversations",)),
    Format(("prompt", "completion")),
    Format(("instruction", "output"), ("input", "history")),
    Format(("query", "response"), ("history",)),
)
_ALWAYS_READ = (*SYSTEM, "tools")  # in every format
# Keys under which a row of turns may repeat a question or an answer.
_QUESTION_KEYS = ("prompt", "instruction", "input", "query")
_ANSWER_KEYS = ("completion", "output", "response")
_REFUSED = frozenset(REFUSED_KEYS)
_PLAIN_ROLES = ("user", "assistant", "human", "gpt", "system")
_PLAIN_ANSWERS = ("assistant", "gpt")


class Columns(NamedTuple):
    """What the user says of a row's keys.

    Attributes:
        prompt: key of the question; None = as in `FORMATS`.
        completion: key of the answer; None = as in `FORMATS`.
        ignore: keys to leave out.
    """

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
        RowProblem: it is no object, has no known format, a malformed turn, two keys that contradict each other, a key
            of `REFUSED_KEYS`, or no answer to learn.
    """
    if not isinstance(row, dict):
        raise RowProblem(f"a row must be an object, got {json_type(row)}")
    given = {key: value for key, value in row.items() if key not in columns.ignore and is_given(value)}
    row_format = columns.format_of(given) or columns.format_of([key for key in row if key not in columns.ignore])
    if row_format is None:
        raise RowProblem(_no_format(row, columns))
    if len(row_format.keys) == 1:
        messages = read_turns(row[row_format.keys[0]], row_format.keys[0], ignore=columns.ignore)
    else:
        messages = _read_exchange(row, given, row_format, columns.ignore)
    others = {key: value for key, value in given.items() if key not in (*row_format.keys, *row_format.optional)}
    if not others:
        return Conversation(messages)
    messages = with_system(messages, given, columns.ignore)
    tools = read_tools(given["tools"], "tools") if "tools" in given else ()
    read = {key for key, value in others.items() if key in _ALWAYS_READ or _repeats_turns(key, value, messages)}
    rendered = tuple(key for key, value in others.items() if key not in read and _renders_turns(key, value, messages))
    return Conversation(messages, tools, (*rendered, *unread_keys(others, {*read, *rendered}, "the row")))


def _read_exchange(
    row: Mapping[str, Any], given: Mapping[str, Any], row_format: Format, ignore: Collection[str]
) -> tuple[Message, ...]:
    """Return the turns of a row that holds a question and its answer, perhaps behind earlier pairs."""
    messages: list[Message] = []
    if "history" in row_format.optional and "history" in given:
        messages += _read_history(given["history"])
    question_key, answer_key = row_format.keys
    if isinstance(row[question_key], list) and "input" not in row_format.optional:
        # What the assistant says within a prompt is context, as TRL treats it.
        asked = read_turns(row[question_key], question_key, prompt=True, ignore=ignore)
        messages += (
            replace(turn, supervised=False) if turn.role == "assistant" and turn.supervised is None else turn
            for turn in asked
        )
    else:
        question = _text(row[question_key], question_key)
        if "input" in row_format.optional and "input" in given:
            more = _text(given["input"], "input")
            question = more if is_blank(question) else f"{question}\n{more}"
        messages.append(_turn("user", question, question_key))
    if isinstance(row[answer_key], list):
        messages += read_turns(row[answer_key], answer_key, ignore=ignore)
    else:
        messages.append(_turn("assistant", _text(row[answer_key], answer_key), answer_key))
    return tuple(messages)


def _read_history(history: object) -> list[Message]:
    """Return the turns of earlier pairs of question and answer."""
    messages = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        place = f"history[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowProblem(f"{place} must be a pair of question and answer, got {json_type(pair)}", "history")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_turn(role, _text(text, place), place))
    return messages


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"column {name!r} must be text, got {json_type(value)}")
    return read_content(value, f"column {name!r}")[0]


def _turn(role: str, text: str, name: str) -> Message:
    if is_blank(text):
        why = "nothing is asked" if role == "user" else "there is nothing to learn"
        raise RowProblem(f"column {name!r} is empty, so {why}")
    return Message(role, text)


def with_system(messages: tuple[Message, ...], given: Mapping[str, Any], ignore: Any) -> tuple[Message, ...]:
    """Return the turns with the row's `system` text before them, unless a system turn says it already.

    Raises:
        RowProblem: the system texts of the row and of its turns differ.
    """
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


def _repeats_turns(key: str, value: object, messages: tuple[Message, ...]) -> bool:
    """Return whether a key only repeats the turns or one of them, as `prompt` does in many data sets."""
    if isinstance(value, list) and len(messages) == len(value) and key in ("messages", "conversations"):
        return read_turns(value, key) == messages
    if not isinstance(value, str):
        return False
    role = "user" if key in _QUESTION_KEYS else "assistant" if key in _ANSWER_KEYS else None
    return any(turn.role == role and turn.content.strip() == value.strip() for turn in messages)


def _renders_turns(key: str, value: object, messages: tuple[Message, ...]) -> bool:
    """Return whether a text contains every line of the turns: then it is a rendering of them, and adds nothing."""
    if key not in (*_QUESTION_KEYS, "text") or not isinstance(value, str):
        return False
    return all(line.strip() in value for turn in messages for line in turn.content.splitlines())


def _no_format(row: Mapping[Any, Any], columns: Columns) -> str:
    names = ", ".join(repr(name) for name in list(row)[:8]) or "it is empty"
    if columns.prompt is not None:
        missing = next(name for name in columns[:2] if name not in row or name in columns.ignore)
        return f"no column {missing!r}, the row has {names}"
    known = " | ".join(", ".join(row_format.keys) for row_format in FORMATS)
    return f"no messages: among its keys ({names}) are none of {known}"


def check_row(row: object, columns: Columns = NO_COLUMNS) -> None:
    """Raise what `read_conversation` raises; quicker, because most rows need no reading (`is_plain`)."""
    if not is_plain(row, columns):
        read_conversation(row, columns)


def is_plain(row: object, columns: Columns = NO_COLUMNS) -> bool:
    """Return whether a row has only common roles and visible texts, and so can be read without a closer look.

    Opening a file asks this of every row, and reading each would take much longer.
    """
    if type(row) is not dict or columns.ignore:
        return False
    if columns.prompt is not None:
        names = columns[:2]
    else:
        names = ("messages",) if "messages" in row else ("conversations",)
    if len(row) > len(names) and not _REFUSED.isdisjoint(row.keys() - set(names)):
        return False
    if len(names) == 2:
        return _is_plain_text(row.get(names[0])) and _is_plain_text(row.get(names[1]))
    turns = row.get(names[0])
    if type(turns) is not list:
        return False
    role_key, text_key = ("role", "content") if names[0] == "messages" else ("from", "value")
    role = None
    for turn in turns:
        if type(turn) is not dict or len(turn) != 2 or not _is_plain_text(turn.get(text_key)):
            return False
        role = turn.get(role_key)
        if role not in _PLAIN_ROLES:
            return False
    return role in _PLAIN_ANSWERS


def _is_plain_text(text: object) -> bool:
    if type(text) is not str or not "!" <= text[:1] <= "~":
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
