"""Which spans of a rendered conversation training supervises, and why a chat template may not show them.

`ChatTemplate.encode` calls these with its `render_spans`: turns → text and the spans of its answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

from unmask.data.renderings import PROBE, Span, Turn, answer_turns, reasoning_of, with_reasoning
from unmask.data.template_source import remedy
from unmask.errors import DataError

Rendered = tuple[str, list[Span | None]]  # the text, and spans of it


class RenderSpans(Protocol):
    """Renders turns; the spans are those of a template's `{% generation %}` tags, none where it has no tags."""

    def __call__(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False, supervise_reasoning: bool = False
    ) -> Rendered:
        """Return the text and its spans; DataError when the template refuses the turns."""
        ...


def spans_of_answers(
    render: RenderSpans,
    turns: Sequence[Turn],
    spans: list[Span | None],
    wanted: Sequence[range],
    supervise_reasoning: bool,
    name: str,
) -> list[Span | None]:
    """Return the spans that belong to the `wanted` answers of a conversation.

    Args:
        spans: all spans of the rendered turns, one or more for each answer.
        wanted: some of `answer_turns`.
        name: what messages call the template.

    Raises:
        DataError: which spans belong to which answer is unknown.
    """
    answers = answer_turns(_text(render), turns)
    if len(wanted) == len(answers):
        return spans
    if len(spans) == len(answers):
        return [span for answer, span in zip(answers, spans, strict=True) if answer in wanted]
    # The spans before an answer are as many as the conversation before it has by itself.
    firsts = [len(render(turns[: answer.start], False, supervise_reasoning)[1]) for answer in answers]
    parts = [spans[first:last] for first, last in pairwise((*firsts, len(spans)))]
    kept = [part for answer, part in zip(answers, parts, strict=True) if answer in wanted]
    if not all(kept):
        raise DataError(
            f"dataset.answers: {name} tags {len(spans)} stretches in {len(answers)} answers, so which of them "
            "belong to which is unknown; set dataset.answers: all, or tag each answer once"
        )
    return [span for part in kept for span in part]


def check_tagged_reasoning(render: RenderSpans, turns: Sequence[Turn], supervise_reasoning: bool, name: str) -> None:
    """Raise DataError if reasoning is inside the tags and should not be supervised, or outside and should be."""
    probed = [with_reasoning(turn, PROBE) if reasoning_of(turn) else turn for turn in turns]
    text, spans = render(probed, supervise_reasoning=supervise_reasoning)
    for match in re.finditer(PROBE, text):
        inside = any(start <= match.start() < end for start, end in filter(None, spans))
        if inside and not supervise_reasoning:
            raise DataError(
                f"dataset.supervise_reasoning: {name} has reasoning inside its {{% generation %}} tags; set "
                "dataset.supervise_reasoning: true, or name a template in dataset.chat_template that tags it not"
            )
        if supervise_reasoning and not inside:
            raise DataError(
                f"dataset.supervise_reasoning: {name} has reasoning outside its {{% generation %}} tags and "
                "knows no variable supervise_reasoning; set dataset.supervise_reasoning: false, or name another "
                "template in dataset.chat_template"
            )


def check_whole_answers(
    render: RenderSpans, turns: Sequence[Turn], spans: Sequence[Span | None], wanted: Sequence[range], name: str
) -> None:
    """Raise DataError if unsupervised reasoning splits an answer: its first part would be learned without an end."""
    inside = {number for answer in wanted for number in answer}
    bare = [with_reasoning(turn, "") if number in inside else turn for number, turn in enumerate(turns)]
    if len(spans) > len(render(bare)[1]):
        raise DataError(
            f"dataset.supervise_reasoning: {name} has reasoning between assistant messages in a row, which "
            "are one answer, so what stands before it has no end to learn; set dataset.supervise_reasoning: true, "
            "or give the reasoning with the first of them"
        )


def unknown_answers(
    render: RenderSpans, turns: Sequence[Turn], spans: Sequence[Span | None], supervise_reasoning: bool, name: str
) -> str:
    """Return why comparing renderings did not find some of the answers, as a message with its remedy.

    Raises:
        DataError: the template refuses a part of the conversation; in its own words, which say more.
    """
    for answer in answer_turns(_text(render), turns):
        render(turns[: answer.start], add_generation_prompt=True)
        render(turns[: answer.stop])
    untagged = f"dataset.chat_template: {name} has no {{% generation %}} tags"
    if not supervise_reasoning and any(map(reasoning_of, turns)):
        return (
            f"{untagged}, and its renderings with and without reasoning do not show where the answer after it "
            "starts; set dataset.supervise_reasoning: true, or name a template with tags in dataset.chat_template"
        )
    if spans[-1]:
        return (
            f"{untagged} and renders an answer differently once more turns follow, so where the earlier answers "
            "of a conversation lie is unknown; set dataset.answers: one or last, or "
            f"{remedy().removeprefix('set ')}"
        )
    return (
        f"{untagged} and renders the turns before an answer differently once the answer follows, so where an "
        f"answer starts is unknown; {remedy()}"
    )


def _text(render: RenderSpans) -> Callable[[Sequence[Turn], bool], str]:
    return lambda turns, add_generation_prompt: render(turns, add_generation_prompt)[0]
