"""Where the answers lie in a rendered conversation, found by comparing renderings of a template without tags.

What precedes an assistant turn, with the generation prompt, must be the start of what includes the turn; the rest is
the turn. A later turn may change how an earlier one is rendered: templates show reasoning in the newest answer only,
and some render assistant turns in a row as one. Both are recognised; whatever else differs gives no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from unmask.data.conversation import REASONING

Span = tuple[int, int]  # characters [start, end) of a rendered text
Turn = dict[str, Any]
Render = Callable[[Sequence[Turn], bool], str]  # turns, whether the generation prompt follows them → text


def assistant_runs(turns: Sequence[Turn]) -> list[range]:
    """Return the numbers of the assistant turns, those in a row together."""
    runs = []
    for is_assistant, group in groupby(range(len(turns)), key=lambda number: turns[number]["role"] == "assistant"):
        numbers = list(group)
        if is_assistant:
            runs.append(range(numbers[0], numbers[-1] + 1))
    return runs


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


def find_answers(render: Render, text: str, turns: Sequence[Turn], supervise_reasoning: bool) -> list[Span | None]:
    """Return where the answers lie in `text`, in order, None for one that cannot be told.

    Args:
        render: the template.
        text: its rendering of all turns, with or without a generation prompt.
        turns: the conversation.
        supervise_reasoning: rendered reasoning is part of the answer; otherwise the answer starts after it.
    """
    spans: list[Span | None] = []
    for run in assistant_runs(turns):
        located = [_turn(render, text, turns, range(number, number + 1), supervise_reasoning) for number in run]
        if None in located and len(run) > 1:
            located = [_turn(render, text, turns, run, supervise_reasoning)]
        spans += located
    return spans


def _turn(render: Render, text: str, turns: Sequence[Turn], run: range, supervise_reasoning: bool) -> Span | None:
    """Return where the answer of assistant turns in a row lies, given that they are rendered as one turn."""
    earlier, answers = turns[: run.start], turns[run.start : run.stop]
    bare = [with_reasoning(turn, "") for turn in answers]
    before = render(earlier, True)
    through = render([*earlier, *answers], False)
    if not text.startswith(through):
        # Perhaps its reasoning is left out once more turns follow.
        through = render([*earlier, *bare], False)
        answers = bare
    if not (text.startswith(through) and through.startswith(before)):
        return None
    header = before.removeprefix(render(earlier, False)) if len(run) > 1 else ""
    if header and header in through[len(before) :]:
        return None  # turns of their own, whose headers are no part of an answer
    if supervise_reasoning or answers == bare:
        return len(before), len(through)
    return _after_reasoning(before, through, render([*earlier, *bare], False))


def _after_reasoning(before: str, through: str, without: str) -> Span | None:
    """Return where the answer lies behind its reasoning: it is what is left when the reasoning is taken away."""
    answer = without[len(before) :]
    start = len(through) - len(answer)
    if not without.startswith(before) or not through.endswith(answer) or start < len(before):
        return None
    return start, len(through)
