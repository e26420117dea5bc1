"""What a chat template does with a conversation, found by comparing its renderings.

Answers: what precedes an assistant turn, with the generation prompt, must be the start of what includes the turn; the
rest is the turn. A later turn may change how an earlier one is rendered: templates show reasoning in the newest answer
only, and some render assistant turns in a row as one. Both are recognised; whatever else differs gives no answer.

Control tokens: each that a turn's text spells becomes a marker of private-use characters while the template renders it,
so that it stays text. Whatever the template writes itself is a control token, whatever a marker stands for is
characters. A template that acts on such text (one that removes reasoning spelt within an answer, say) would not see it:
then the text is first replaced by what the template makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from unmask.data.conversation import REASONING
from unmask.errors import DataError

Span = tuple[int, int]  # characters [start, end) of a rendered text
Turn = dict[str, Any]
Render = Callable[[Sequence[Turn], bool], str]  # turns, whether the generation prompt follows them → text
RenderAlike = Callable[[Sequence[Turn]], str]  # turns → text, all with or all without it

# Private-use characters, which no tokenizer gives a meaning.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKER = f"{_OPEN}[0-9]+{_CLOSE}"
PROBE = f"{_OPEN}probe{_CLOSE}"  # no marker, and no text that a row has


def answer_turns(render: Render, turns: Sequence[Turn]) -> list[range]:
    """Return the numbers of the assistant turns that make up each answer, in order.

    Assistant turns in a row are one answer where the template writes them as one turn of the model, which it ends once;
    where each has a header of its own, each is an answer. Only such turns have to be rendered to know.
    """
    answers: list[range] = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if answers and answers[-1].stop == number and not _has_its_header(render, turns, number):
            answers[-1] = range(answers[-1].start, number + 1)
        else:
            answers.append(range(number, number + 1))
    return answers


def _has_its_header(render: Render, turns: Sequence[Turn], number: int) -> bool:
    """Say whether a turn is written where the assistant's next answer would be, given the turns before it."""
    through, before = render(turns[: number + 1], False), turns[:number]
    # The reasoning of the turn before it may be left out once it follows.
    earlier = (before, [*before[:-1], with_reasoning(before[-1], "")])
    return any(through.startswith(render(some, True)) for some in earlier)


def reasoning_of(turn: Turn) -> str:
    """Return what the assistant thought before this turn, "" for nothing."""
    return next((turn[name] for name in REASONING if turn.get(name)), "")


def with_reasoning(turn: Turn, reasoning: str) -> Turn:
    """Return the turn with other reasoning, under the names that it has; "" takes it away."""
    return {
        key: reasoning if key in REASONING else value
        for key, value in turn.items()
        if reasoning or key not in REASONING
    }


def find_answers(
    render: Render, text: str, turns: Sequence[Turn], supervise_reasoning: bool, tail: str = ""
) -> list[Span | None]:
    """Return where each of `answer_turns` lies in `text`, None for one whose place is unknown.

    So it is where the template refuses a part of the conversation, though it took the whole.

    Args:
        render: the template.
        text: its rendering of all turns, with or without a generation prompt.
        turns: the conversation.
        supervise_reasoning: rendered reasoning is part of the answer; otherwise the answer starts after it.
        tail: what the template writes at the end of a conversation alone (`turns.AnswerForm`).
    """
    return [_answer(render, text, turns, run, supervise_reasoning, tail) for run in answer_turns(render, turns)]


def _answer(
    render: Render, text: str, turns: Sequence[Turn], run: range, supervise_reasoning: bool, tail: str
) -> Span | None:
    """Return where an answer of the assistant turns `run` lies."""
    try:
        return _compared(render, text, turns, run, supervise_reasoning, tail)
    except DataError:
        return None


def _compared(
    render: Render, text: str, turns: Sequence[Turn], run: range, supervise_reasoning: bool, tail: str
) -> Span | None:
    earlier, given = turns[: run.start], turns[run.start : run.stop]
    bare = [with_reasoning(turn, "") for turn in given]
    before = render(earlier, True)
    # Once more turns follow, its reasoning may be left out, and so is what ends a conversation.
    for answers, end in product((given, bare), ("", tail)):
        through = render([*earlier, *answers], False).removesuffix(end)
        if text.startswith(through):
            break
    else:
        return None
    if not through.startswith(before):
        return None
    header = before.removeprefix(render(earlier, False)) if len(run) > 1 else ""
    if header and header in through[len(before) :]:
        return None  # turns of their own, whose headers are no part of an answer
    if supervise_reasoning or answers == bare:
        return len(before), len(through)
    return _after_reasoning(before, through, render([*earlier, *bare], False).removesuffix(end))


def _after_reasoning(before: str, through: str, without: str) -> Span | None:
    """Return where the answer lies behind its reasoning: it is what is left when the reasoning is taken away."""
    answer = without[len(before) :]
    start = len(through) - len(answer)
    if not without.startswith(before) or not through.endswith(answer) or start < len(before):
        return None
    return start, len(through)


def joined(spans: Sequence[Sequence[int]]) -> list[Span | None]:
    """Return spans in order, those that touch as one: assistant turns in a row that the template joins."""
    together: list[Span | None] = []
    for start, end in spans:
        last = together[-1] if together else None
        if last and last[1] == start:
            together[-1] = (last[0], end)
        else:
            together.append((start, end))
    return together


def cut_at(spans: Sequence[Span | None], length: int) -> list[Span]:
    """Return the pieces of 0..length when it is cut at both ends of every span."""
    cuts = sorted({0, length, *(cut for span in spans if span for cut in span)})
    return list(pairwise(cuts))


@dataclass(frozen=True)
class Marked:
    """Turns with a marker in the place of each control token, and what the markers stand for, by their numbers."""

    turns: list[Turn]
    spelt: list[str]

    def restored(self, text: str) -> str:
        """Return rendered text with each marker replaced by what it stands for."""
        return text if not self.spelt else re.sub(_MARKER, lambda match: self.spelt[int(match.group()[1:-1])], text)

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
    turns: Sequence[Turn], controls: re.Pattern[str], render: RenderAlike, name: str, supervise_reasoning: bool = False
) -> Marked:
    """Return the turns with a marker in the place of each control token that their text spells.

    Args:
        controls: from `control_pattern`.
        render: the template, with or without a generation prompt.
        name: what messages call the template.
        supervise_reasoning: refuse an answer from which the template removes text, for it may be its reasoning.

    Raises:
        DataError: the template acts on such text in a way that its renderings do not show.
    """
    marked = _with_markers(turns, controls)
    if not marked.spelt:
        return marked
    literal = render(turns)
    if marked.restored(render(marked.turns)) == literal:
        return marked
    marked = _with_markers(_as_read(turns, controls, render, name, supervise_reasoning), controls)
    if marked.restored(render(marked.turns)) != literal:
        raise DataError(_unclear(turns, controls, name))
    return marked


def literal_pieces(text: str, controls: re.Pattern[str]) -> list[str]:
    """Return a text in pieces that spell no control token: each of these is split after its first character."""
    marked = _with_markers([{"content": text}], controls)
    return list(marked.pieces(marked.turns[0]["content"]))


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
    turns: Sequence[Turn], controls: re.Pattern[str], render: RenderAlike, name: str, supervise_reasoning: bool
) -> list[Turn]:
    """Return the turns with what the template makes of the text of each that spells a control token."""
    read = list(turns)
    for number, turn in enumerate(turns):
        content = turn["content"]
        if not isinstance(content, str) or not controls.search(content):
            continue
        whole = render(read)
        probed = render([*read[:number], {**turn, "content": PROBE}, *read[number + 1 :]])
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
