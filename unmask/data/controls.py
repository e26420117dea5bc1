"""Text that spells control tokens: what it is replaced by while a template renders it, so that it stays text.

Each spelt control token becomes a marker of private-use characters. Whatever the template writes itself is a control
token, whatever a marker stands for is characters. A template that acts on such text (one that removes reasoning spelt
within an answer, say) would not see it: then the text is first replaced by what the template makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.data.answers import Render, Turn
from unmask.errors import DataError

# Private-use characters, which no tokenizer gives a meaning.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKER = f"{_OPEN}[0-9]+{_CLOSE}"
PROBE = f"{_OPEN}probe{_CLOSE}"  # no marker, and no text that a row has


@dataclass(frozen=True)
class Marked:
    """Turns with a marker in the place of each control token, and what the markers stand for, by their numbers."""

    turns: list[Turn]
    spelt: list[str]

    def restored(self, text: str) -> str:
        """Return rendered text with each marker replaced by what it stands for."""
        return re.sub(_MARKER, lambda match: self.spelt[int(match.group()[1:-1])], text)

    def pieces(self, text: str) -> Iterator[str]:
        """Yield rendered text in pieces that spell no control token: one is split after its first character."""
        for part in re.split(f"({_MARKER})", text) if self.spelt else [text]:
            if self.spelt and re.fullmatch(_MARKER, part):
                control = self.spelt[int(part[1:-1])]
                yield control[:1]
                yield control[1:]
            elif part:
                yield part


def control_pattern(controls: Iterable[str]) -> re.Pattern[str]:
    """Match any control token, the longest first, and our own markers, which text must not forge either."""
    words = sorted({word for word in controls if len(word) > 1}, key=lambda word: (-len(word), word))
    return re.compile("|".join([_MARKER, *map(re.escape, words)]))


def mark_controls(
    turns: Sequence[Turn], controls: re.Pattern[str], render: Render, name: str, supervise_reasoning: bool = False
) -> Marked:
    """Return the turns with a marker in the place of each control token that their text spells.

    Args:
        controls: from `control_pattern`.
        name: what messages call the template.
        supervise_reasoning: refuse an answer from which the template removes text, for it may be its reasoning.

    Raises:
        DataError: the template acts on such text in a way that cannot be told from its renderings.
    """
    marked = _with_markers(turns, controls)
    if not marked.spelt:
        return marked
    literal = render(turns, False)
    if marked.restored(render(marked.turns, False)) == literal:
        return marked
    marked = _with_markers(_as_read(turns, controls, render, name, supervise_reasoning), controls)
    if marked.restored(render(marked.turns, False)) != literal:
        raise DataError(_unclear(turns, controls, name))
    return marked


def _with_markers(turns: Sequence[Turn], controls: re.Pattern[str]) -> Marked:
    numbers: dict[str, int] = {}  # equal texts stay equal: reasoning is given to the template under several names

    def mark(match: re.Match[str]) -> str:
        return f"{_OPEN}{numbers.setdefault(match.group(), len(numbers))}{_CLOSE}"

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return controls.sub(mark, value)
        if isinstance(value, Mapping):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    return Marked([marked(turn) for turn in turns], list(numbers))


def _as_read(
    turns: Sequence[Turn], controls: re.Pattern[str], render: Render, name: str, supervise_reasoning: bool
) -> list[Turn]:
    """Return the turns with what the template makes of the text of each that spells a control token."""
    read = list(turns)
    for number, turn in enumerate(turns):
        content = turn["content"]
        if not isinstance(content, str) or not controls.search(content):
            continue
        whole = render(read, False)
        probed = render([*read[:number], {**turn, "content": PROBE}, *read[number + 1 :]], False)
        start, _, end = probed.partition(PROBE)
        if not (whole.startswith(start) and whole[len(start) :].endswith(end)):
            raise DataError(_unclear(turns, controls, name))
        text = whole[len(start) : len(whole) - len(end)]
        if supervise_reasoning and turn["role"] == "assistant" and controls.findall(text) != controls.findall(content):
            raise DataError(
                f"dataset.supervise_reasoning: {name} removes the text at {controls.findall(content)[0]!r} from "
                f"turn {number}; give reasoning as reasoning_content of the turn, or take it out of the row"
            )
        read[number] = {**turn, "content": text}
    return read


def _unclear(turns: Sequence[Turn], controls: re.Pattern[str], name: str) -> str:
    match = next(filter(None, (controls.search(str(turn["content"])) for turn in turns)), None)
    example = f", such as {match.group()!r}" if match else ""
    return (
        f"dataset.chat_template: {name} acts on control tokens that the text of a turn spells{example}; "
        "take them out of the row"
    )
