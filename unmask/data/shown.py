"""Finds what a chat template leaves out of a conversation's text, by rendering the conversation with probes.

A probe takes the place of each text, reasoning, and name and argument of a call, and is then looked for in the rendered
text. Templates hardly look at texts themselves: they look at roles, at which turns have reasoning or calls, and at keys
of their own. Conversations that agree in these have one shape, and each shape is probed once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from unmask.data.conversation import REASONING
from unmask.data.renderings import Span, Turn, reasoning_of, with_reasoning
from unmask.errors import DataError

UNSHOWN_REASONING = "reasoning that the chat template does not show, so nothing learns from it"
CHANGED_TEXT = "a text that the chat template changes or shows in part"
UNTAGGED = "an answer that the chat template does not tag, so nothing learns it"
UNREAD_KEY = "the key {!r} of a turn, which nothing reads"
_TEXT, _REASONING, _NAME, _ARGUMENTS = "text", "reasoning", "name", "arguments"
Shape = tuple[Any, ...]


def shape_of(turns: Sequence[Turn]) -> Shape:
    """Return what a rendering may depend on: each turn's role, which of text, reasoning and calls it has, the rest."""
    return tuple(
        (turn["role"], bool(text_of(turn)), bool(reasoning_of(turn)), _calls(turn), _text_of_keys(turn))
        for turn in turns
    )


def with_probes(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with a probe in the place of each text that a template may show."""
    probed = []
    for number, turn in enumerate(turns):
        if reasoning_of(turn):
            turn = with_reasoning(turn, _probe(_REASONING, number))
        if text_of(turn):
            turn = {**turn, "content": _probe(_TEXT, number)}
        if turn.get("tool_calls"):
            calls = [
                {**call, "function": _probed_call(call["function"], f"{number}.{place}")}
                for place, call in enumerate(turn["tool_calls"])
            ]
            turn = {**turn, "tool_calls": calls}
        probed.append(turn)
    return probed


def check_shown(turns: Sequence[Turn], text: str, answers: Sequence[Span | None] | None, name: str) -> tuple[str, ...]:
    """Raise DataError if a template leaves out the text or the calls of a turn; return notes on what else it omits.

    Args:
        turns: as given to `with_probes`.
        text: the rendering of what `with_probes` returned.
        answers: where the answers lie in it, which calls must be part of; None where nothing is learned.
        name: what messages call the template.

    Raises:
        DataError: a turn's text or calls are missing from the text, or calls from its answers.
    """
    for number, turn in enumerate(turns):
        where = f"turn {number}, of the {turn['role']}"
        if text_of(turn) and _probe(_TEXT, number) not in text:
            raise DataError(
                f"dataset.chat_template: {name} does not show the text of {where}, so it would be lost; name a "
                "template that shows it, or take the turn out of the row"
            )
        for probe in _call_probes(turn, number):
            at = text.find(probe)
            if at < 0:
                raise DataError(
                    f"dataset.chat_template: {name} does not show the tool_calls of {where}, all of them, with all "
                    "their arguments as JSON; name a template that does, or leave them out with dataset.ignore_keys"
                )
            inside = answers is None or None in answers or any(s[0] <= at < s[1] for s in answers if s)
            if not inside:
                raise DataError(
                    f"dataset.chat_template: {name} does not supervise the tool_calls of {where}, which are its "
                    "answer; name a template that has them inside its {% generation %} tags"
                )
    hidden = any(reasoning_of(turn) and _probe(_REASONING, number) not in text for number, turn in enumerate(turns))
    return (UNSHOWN_REASONING,) if hidden else ()


def text_of(turn: Turn) -> str:
    """Return the text of a turn, stripped, since templates may strip it."""
    return turn["content"].strip() if isinstance(turn.get("content"), str) else ""


def more_keys(turn: Turn) -> list[str]:
    """Return the keys of a turn that only the chat template may read."""
    return [key for key in turn if key not in ("role", "content", "tool_calls", *REASONING)]


def _probed_call(function: Turn, place: str) -> Turn:
    arguments = {key: _probe(_ARGUMENTS, f"{place}.{n}") for n, key in enumerate(function.get("arguments") or {})}
    return {**function, "name": _probe(_NAME, place), "arguments": arguments}


def _call_probes(turn: Turn, number: int) -> Iterator[str]:
    for place, arguments in enumerate(_calls(turn)):
        yield _probe(_NAME, f"{number}.{place}")
        yield from (_probe(_ARGUMENTS, f"{number}.{place}.{n}") for n in range(len(arguments)))


def _probe(what: str, place: object) -> str:
    return f"\ue0f0{what}{place}\ue0f1"  # private-use characters, as in renderings.py; no marker has letters


def _calls(turn: Turn) -> Shape:
    return tuple(tuple(call["function"].get("arguments") or ()) for call in turn.get("tool_calls") or ())


def _text_of_keys(turn: Turn) -> str:
    keys = more_keys(turn)
    return json.dumps({key: turn[key] for key in keys}, default=str) if keys else ""
