"""Finds what a chat template writes around the texts of turns: its turn tokens, and how it starts and ends an answer.

No token is known by its name. The template renders conversations whose texts are probes, and whatever stands between
the probes comes from the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from unmask.data.renderings import PROBE, Render, Turn
from unmask.errors import DataError

_NEXT = PROBE.replace("probe", "next")
_ASK, _ANSWER = {"role": "user", "content": _NEXT}, {"role": "assistant", "content": PROBE}
_SYSTEM, _TOOL = {"role": "system", "content": _NEXT}, {"role": "tool", "content": _NEXT}
_CALL: Turn = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": {"a": PROBE}}}],
}
# Some templates insist on a system turn, others refuse one.
STARTS: tuple[tuple[Turn, ...], ...] = ((_ASK,), (_SYSTEM, _ASK))
# Tokens that look like markup, such as <|end|>, </s> or [INST]; one that is a plain word may be part of any text.
MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True)
class AnswerForm:
    """What a chat template writes around the text of an answer; all empty where it renders no plain exchange.

    A conversation that ends with its answer is rendered as `question{header}{opening}answer{closing}`; where another
    question follows, `answer{middle}question` is in it.

    Attributes:
        start: the turns before the answer that it was asked to render: a question, perhaps behind a system turn.
        header: from the text of the question to where a prompt ends.
        opening: from there to the text of the conversation's last answer; a model learns to write it.
        lead: from the text of the last answer to the first token that ends an answer, such as a line break.
        closing: all that follows the text of the last answer.
        tail: the end of `closing` that ends the conversation, not the answer, such as EOS behind a turn token; "" where
            the rest of `closing` has no control token, so that an answer would have no end without it.
        middle: from the text of an answer to that of the next question; None where the template refuses a second one.
        unprompted: whether renderings with and without the generation prompt are the same.
        stop_ids: the tokens that end an answer: the first control tokens of `closing` and of `middle`, and the last
            control token behind a tool call that has none of these nor EOS.
    """

    start: tuple[Turn, ...] = ()
    header: str = ""
    opening: str = ""
    lead: str = ""
    closing: str = ""
    tail: str = ""
    middle: str | None = None
    unprompted: bool = False
    stop_ids: tuple[int, ...] = ()

    @property
    def shows_start(self) -> bool:
        """Whether comparing renderings with and without an answer shows where the answer starts, behind its header."""
        if not self.unprompted:
            return True
        # Either the template writes no header, or it appends a generation prompt to every conversation, even to one
        # that ends with an answer: then `closing` ends as `header` does.
        shared = commonprefix([self.header[::-1], self.closing[::-1]]).strip()
        goes_on = self.middle is not None and self.middle.startswith(self.closing)
        return not self.opening.strip() and (goes_on or not shared)


def special_words(tokenizer: Any, more_ids: Iterable[int] = ()) -> set[str]:
    """Return the texts of a tokenizer's special tokens and of the tokens `more_ids`."""
    words = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words.update(tokenizer.all_special_tokens)
    return words | {word for word in tokenizer.convert_ids_to_tokens(list(more_ids)) if word}


def turn_tokens(tokenizer: Any, render: Render) -> dict[int, str]:
    """Return id → text of the tokens that a template writes around the texts of turns, whatever their `special` flag.

    They are added tokens that are no plain words, and single tokens of the vocabulary that look like markup. What the
    template writes in front of the last answer alone, such as an empty thought, does not count.
    """
    added = {token: str(word) for token, word in tokenizer.added_tokens_decoder.items()}
    found: dict[int, str] = {}
    for text in _written(render):
        found.update(_markup(tokenizer, text, added))
    for start in STARTS:
        behind = _markup(tokenizer, _behind_call(render, start), added)
        if behind and found.keys().isdisjoint(behind):
            found.update(list(behind.items())[-1:])  # those before it end the call, not the turn
    return found


def answer_form(tokenizer: Any, render: Render, turn: Iterable[int]) -> AnswerForm:
    """Return what a template writes around an answer; `turn` are the ids of its turn tokens."""
    for start in STARTS:
        prompt, whole = _attempt(render, start, True), _attempt(render, (*start, _ANSWER), False)
        if prompt is not None and whole is not None and PROBE in whole:
            break
    else:
        return AnswerForm()
    before, _, closing = whole.rpartition(PROBE)
    through = _attempt(render, (*start, _ANSWER, _ASK), True)
    middle = through.rpartition(PROBE)[2].partition(_NEXT)[0] if through is not None and PROBE in through else None
    controls = {*turn, *tokenizer.all_special_ids}
    controls |= {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
    ends = [_first(tokenizer, text, controls) for text in (closing, middle or "")]
    stops = {end[0] for end in ends if end is not None}
    called = [token for token in _ids(tokenizer, _behind_call(render, start)) if token in controls]
    if called and not {*stops, tokenizer.eos_token_id}.intersection(called):
        stops.add(called[-1])  # not the first, which may only end the call
    shared = _shared_start(closing, middle or "", tokenizer.convert_ids_to_tokens(sorted(controls)))
    lead = closing if ends[0] is None else closing.partition(ends[0][1])[0]
    return AnswerForm(
        start=start,
        header=prompt.rpartition(_NEXT)[2],
        opening=before.removeprefix(prompt) if before.startswith(prompt) else "",
        lead=lead,
        closing=closing,
        tail=closing[len(shared) :] if _first(tokenizer, shared, controls) else "",
        middle=middle,
        unprompted=prompt == _attempt(render, start, False),
        stop_ids=tuple(sorted(stops)),
    )


def _written(render: Render) -> Iterator[str]:
    """Yield what a template writes around the texts of conversations that it takes."""
    for start in STARTS:
        for turns, prompt in ((start, True), ((*start, _ANSWER, _ASK), True), ((*start, _ANSWER, _TOOL), True)):
            yield from re.split(f"{PROBE}|{_NEXT}", _attempt(render, turns, prompt) or "")
        yield (_attempt(render, (*start, _ANSWER), False) or "").rpartition(PROBE)[2]


def _behind_call(render: Render, start: Sequence[Turn]) -> str:
    """Return what a template writes behind the last argument of an answer that calls a tool; "" if it shows none."""
    _, shown, behind = (_attempt(render, (*start, _CALL), False) or "").rpartition(PROBE)
    return behind if shown else ""


def _markup(tokenizer: Any, text: str, added: Mapping[int, str]) -> dict[int, str]:
    """Return the tokens of a text, in order, that are `added` and no plain words, or that look like markup."""
    found = {}
    for token in _ids(tokenizer, text):
        word = added.get(token) or str(tokenizer.convert_ids_to_tokens(token))
        markup = token in added and bool(word.strip()) and not word.strip().isalnum()
        if len(word) > 1 and word in text and (markup or MARKUP.fullmatch(word)):
            found[token] = word
    return found


def _attempt(render: Render, turns: Sequence[Turn], prompt: bool) -> str | None:
    """Return the text of a conversation, None where the template refuses it."""
    try:
        return render(turns, prompt)
    except DataError:
        return None


def _shared_start(one: str, other: str, controls: Iterable[str]) -> str:
    """Return how two texts begin alike, no control token cut."""
    cut = re.compile(f"({'|'.join(map(re.escape, sorted(controls, key=len, reverse=True)))})")
    shared = ""
    for number, (part, match) in enumerate(zip(cut.split(one), cut.split(other), strict=False)):
        if part != match:
            return shared + ("" if number % 2 else commonprefix([part, match]))  # tokens are the odd ones
        shared += part
    return shared


def _first(tokenizer: Any, text: str, controls: set[int]) -> tuple[int, str] | None:
    """Return the first control token that a text spells, and how; None without one."""
    found = (
        (token, str(tokenizer.convert_ids_to_tokens(token))) for token in _ids(tokenizer, text) if token in controls
    )
    return next(((token, word) for token, word in found if word in text), None)  # an unknown character spells none


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
