"""The chat template: how a conversation becomes tokens, and which of them training supervises.

Supervision belongs to the template. Where it has `{% generation %}` tags, the tagged text is supervised. Where it has
none, each assistant turn is found by comparing renderings (`renderings.py`): its closing token is supervised,
its header never, its reasoning if asked for.

An answer is tokenised apart from the text before it, as at inference, where the prompt is tokens before the answer is
text. So no token straddles the two, and a header has the same tokens in training and in use also where a tokenizer
looks ahead (many make other tokens of "\\n\\n" before a letter than at the end of the text).

Control tokens come from the template alone: the tokenizer's special tokens, and what the template writes around turns,
special or not (`turns.py`). Where the text of a turn spells one (`<|eot_id|>`, the mask token, …), it is encoded as
ordinary characters, in training and in prompts alike, so no row can forge a turn or inject a mask. A template that
itself removes such text from a turn (reasoning spelt within an answer, say) has its way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from unmask.data.conversation import Message
from unmask.data.renderings import (
    PROBE,
    Marked,
    Span,
    Turn,
    answer_turns,
    control_pattern,
    find_answers,
    literal_pieces,
    mark_controls,
    reasoning_of,
    with_reasoning,
)
from unmask.data.shown import CHANGED_TEXT, UNREAD_KEY, Shape, check_shown, more_keys, shape_of, text_of, with_probes
from unmask.data.template_check import check_answer
from unmask.data.template_source import read_template, remedy, template_names, with_variables, words_of
from unmask.data.turns import AnswerForm, answer_form, special_words, turn_tokens
from unmask.errors import DataError

__all__ = ["ChatTemplate", "Encoded", "load_template", "read_template", "template_names"]

_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CONTROL = re.compile(r"<\|\w+\|?>|<\w+\|>")  # how control tokens look in our own templates
_SHAPES = 4096  # shapes of conversations that are remembered
Rendered = tuple[str, list[Span | None]]  # the text, and its stretches
_PROBE = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True))


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids, for each whether it is part of an answer that training supervises, and notes.

    A note says what the text lacks of the conversation, in the same words for every conversation.
    """

    ids: list[int]
    supervised: list[bool]
    notes: tuple[str, ...] = ()


def load_template(
    tokenizer: Any,
    chat_template: str | None = None,
    control_ids: Sequence[int] = (),
    *,
    variables: Mapping[str, Any] | None = None,
    supervise_reasoning: bool = False,
    for_training: bool = True,
) -> ChatTemplate:
    """Return the template that renders and supervises conversations for `tokenizer`.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: name of one of ours, or path of a .jinja file; None takes the tokenizer's own.
        control_ids: further ids that text must never spell (the model's mask), beside special tokens and those that the
            template writes around turns.
        variables: what the template's own variables are, such as enable_thinking.
        supervise_reasoning: refuse a template that renders no reasoning, or does not show where it is.
        for_training: refuse a template that does not show where answers start; prompts do not need to know.

    Raises:
        DataError: no template, one that cannot be read or does not know a variable, one of ours for another family's
            tokenizer, or (for training) one that does not show where answers start.
    """
    if chat_template is not None:
        source, name = read_template(chat_template), chat_template
    elif tokenizer.chat_template is None:
        raise DataError(f"dataset.chat_template: the tokenizer has no chat template; {remedy()}")
    else:
        try:
            source, name = tokenizer.get_chat_template(), "the tokenizer's chat template"
        except ValueError as error:
            raise DataError(f"dataset.chat_template: {_reason(error)}; {remedy()}") from None
    source = with_variables(source, variables or {}, name)
    special = special_words(tokenizer, control_ids)
    template = ChatTemplate(tokenizer, source, name, bool(_TAG.search(source)), control_pattern(special))
    turn = turn_tokens(tokenizer, template._text)
    template = replace(template, controls=control_pattern(special.union(turn.values())), turn_ids=frozenset(turn))
    if chat_template in template_names():
        _check_vocabulary(template)
    if for_training:
        check_answer(template, supervise_reasoning)
    return template


def _check_vocabulary(template: ChatTemplate) -> None:
    """Refuse a template of ours whose control tokens the tokenizer would spell out in characters."""
    written = dict.fromkeys(_CONTROL.findall(template.render(_PROBE)))
    unknown = [token for token in written if len(template.tokenizer.encode(token, add_special_tokens=False)) != 1]
    if unknown:
        raise DataError(
            f"dataset.chat_template: {template.name} writes {', '.join(unknown)}, which this tokenizer has not among "
            "its tokens, so they would be spelt out as text; name the template of the model's family (one of "
            f"{', '.join(template_names())}), or in dataset.tokenizer the tokenizer of the template's"
        )


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations and says which tokens are supervised; made by `load_template`.

    Attributes:
        source: the template's Jinja source.
        name: what messages call it.
        tagged: whether it has `{% generation %}` tags.
        controls: matches every control token that text may spell.
        turn_ids: the tokens that the template writes around the texts of turns, special or not.
        tools: what the assistant may call, for templates that show it.
        shapes: what the text lacks of conversations of each shape that was met.
    """

    tokenizer: Any
    source: str
    name: str
    tagged: bool
    controls: re.Pattern[str]
    turn_ids: frozenset[int] = frozenset()
    tools: Sequence[Mapping[str, Any]] = ()
    shapes: dict[Shape, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def form(self) -> AnswerForm:
        """What the template writes around an answer."""
        return answer_form(self.tokenizer, self._text, self.turn_ids)

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        """Return the template for conversations in which the assistant may call these tools.

        Raises:
            DataError: their text spells a control token.
        """
        if not tools:
            return self
        spelt = self.controls.search(json.dumps(tools, ensure_ascii=False, default=str))
        if spelt:
            raise DataError(
                f"dataset.chat_template: the row's tools spell {spelt.group()!r}, a control token of {self.name}; take "
                "it out of them, or set dataset.ignore_keys: [tools]"
            )
        return replace(self, tools=tools)

    def knows(self, key: str) -> bool:
        """Say whether the template can know a key of a turn, since it has the word."""
        return key in words_of(self.source)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation; DataError when the template refuses it."""
        return self._render([_as_dict(message) for message in messages], add_generation_prompt)[0]

    def answers(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[range]:
        """Return the numbers of the turns of each answer that may be supervised, in order.

        Assistant turns in a row are one answer where the template writes them as one.

        Raises:
            DataError: one answer has turns that may be supervised and others that may not.
        """
        allowed = []
        for answer in answer_turns(self._text, [_as_dict(message) for message in messages]):
            flags = {_may_be_supervised(messages[number]) for number in answer}
            if len(flags) == 2:
                raise DataError(
                    f"dataset.chat_template: {self.name} joins assistant turns in a row, of which some are learned and "
                    "some are not; give such turns as one, or name another template"
                )
            if flags == {True}:
                allowed.append(answer)
        return allowed

    def check_conversation(self, messages: Sequence[Message | Mapping[str, Any]], supervise_reasoning: bool) -> None:
        """Raise DataError if the template refuses a conversation, or leaves out what its text must have."""
        turns = self._marked(messages, supervise_reasoning).turns
        self._render(turns, supervise_reasoning=supervise_reasoning)
        self._check_shown(turns, False, supervise_reasoning)

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        last_only: bool = False,
        supervise_reasoning: bool = False,
    ) -> Encoded:
        """Return the tokens of a conversation up to its last supervised one, and which of them are supervised.

        Behind the last answer that may be supervised nothing is rendered: neither the answer nor the template's view of
        it depends on what came after. Without such an answer everything is rendered, and nothing supervised.

        Args:
            messages: a turn whose `supervised` is False is context.
            last_only: of the answers that may be supervised, supervise the last alone.
            supervise_reasoning: supervise the reasoning that is rendered, too.

        Raises:
            DataError: the template refuses the conversation, or does not show where its answers or reasoning are.
        """
        answers = self.answers(messages)
        wanted = answers[-1:] if last_only else answers
        marked = self._marked(messages[: answers[-1].stop] if answers else messages, supervise_reasoning)
        turns = marked.turns
        text, spans = self._answers(turns, supervise_reasoning=supervise_reasoning)
        notes = self._check_shown(turns, False, supervise_reasoning)
        if not all(map(marked.restored(text).__contains__, map(text_of, map(_as_dict, messages[: len(turns)])))):
            notes = (*notes, CHANGED_TEXT)
        supervised = self._spans_of(wanted, turns, spans, supervise_reasoning)
        if None in supervised:
            raise DataError(self._unknown_answers(turns, supervise_reasoning))
        if self.tagged and any(map(reasoning_of, turns)):
            self._check_tagged_reasoning(turns, supervise_reasoning)
            self._check_whole_answers(turns, wanted, len(spans))
        end = max((span[1] for span in supervised if span), default=len(text))
        ids, flags = [], []
        for start, stop in _pieces(end, spans):
            piece_ids = self._tokenize(text[start:stop], marked)
            ids += piece_ids
            flags += [any(span and span[0] <= start and stop <= span[1] for span in supervised)] * len(piece_ids)
        return Encoded(ids, flags, notes)

    def encode_prompt(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
        """Return the tokens up to where the assistant's next answer starts; DataError when the template refuses."""
        return [token for piece in self.prompt_pieces(messages) for token in self._ids(piece)]

    def prompt_pieces(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[str]:
        """Return what `encode_prompt` encodes, in the pieces that are tokenised apart."""
        marked = self._marked(messages, prompt=True)
        text, spans = self._answers(marked.turns, add_generation_prompt=True)
        self._check_shown(marked.turns, True)
        return [piece for start, end in _pieces(len(text), spans) for piece in marked.pieces(text[start:end])]

    def literal_pieces(self, text: str) -> list[str]:
        """Return the text of a turn in pieces that spell no control token, to be tokenised apart."""
        return literal_pieces(text, self.controls)

    def around_answer(self, messages: Sequence[Message | Mapping[str, Any]]) -> tuple[str, str]:
        """Return what the template writes between a prompt and the text of its answer, and behind that text."""
        turns = [_as_dict(message) for message in messages]
        prompt = self._render(turns, add_generation_prompt=True)[0]
        before, _, after = self._render([*turns, {"role": "assistant", "content": PROBE}])[0].partition(PROBE)
        return before.removeprefix(prompt) if before.startswith(prompt) else "", after

    def _check_shown(
        self, turns: list[Turn], add_generation_prompt: bool, supervise_reasoning: bool = False
    ) -> tuple[str, ...]:
        """Return what the text lacks of the conversation; DataError where that is something it must have."""
        # What the template has no word for cannot change its text.
        turns = [{key: turn[key] for key in turn if key not in more_keys(turn) or self.knows(key)} for turn in turns]
        shape = (add_generation_prompt, bool(self.tools), supervise_reasoning, shape_of(turns))
        if len(self.shapes) > _SHAPES:
            self.shapes.clear()
        if shape not in self.shapes:
            probed = with_probes(turns)
            text, spans = self._answers(probed, add_generation_prompt, supervise_reasoning)
            if self.tools and text == replace(self, tools=())._render(probed, add_generation_prompt)[0]:
                raise DataError(
                    f"dataset.chat_template: {self.name} does not show the row's tools; name a template that renders "
                    "them, or set dataset.ignore_keys: [tools]"
                )
            keys = dict.fromkeys(key for turn in turns for key in more_keys(turn))
            unread = [UNREAD_KEY.format(key) for key in keys if not self._reads(key, probed, add_generation_prompt)]
            shown = check_shown(turns, text, None if add_generation_prompt else spans, self.name)
            self.shapes[shape] = (*shown, *unread)
        return self.shapes[shape]

    def _reads(self, key: str, turns: list[Turn], add_generation_prompt: bool) -> bool:
        """Say whether a key of the turns changes their text."""
        less = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        try:
            return self._text(less, add_generation_prompt) != self._text(turns, add_generation_prompt)
        except DataError:  # the template insists on it
            return True

    def _spans_of(
        self, wanted: list[range], turns: list[Turn], spans: list[Span | None], supervise_reasoning: bool
    ) -> list[Span | None]:
        """Return the stretches that are the `wanted` of a conversation's answers."""
        answers = answer_turns(self._text, turns)
        if len(wanted) == len(answers):
            return spans
        if len(spans) == len(answers):
            return [span for answer, span in zip(answers, spans, strict=True) if answer in wanted]
        # As many tags stand before an answer as in the conversation before it.
        firsts = [len(self._render(turns[: answer.start], False, supervise_reasoning)[1]) for answer in answers]
        parts = [spans[first:last] for first, last in pairwise((*firsts, len(spans)))]
        kept = [part for answer, part in zip(answers, parts, strict=True) if answer in wanted]
        if not all(kept):
            raise DataError(
                f"dataset.answers: {self.name} tags {len(spans)} stretches in {len(answers)} answers, so which of them "
                "belong to which is unknown; set dataset.answers: all, or tag each answer once"
            )
        return [span for part in kept for span in part]

    def _check_tagged_reasoning(self, turns: list[Turn], supervise_reasoning: bool) -> None:
        """Refuse tags that take reasoning in or leave it out against what is asked for."""
        probed = [with_reasoning(turn, PROBE) if reasoning_of(turn) else turn for turn in turns]
        text, spans = self._render(probed, supervise_reasoning=supervise_reasoning)
        for match in re.finditer(PROBE, text):
            inside = any(start <= match.start() < end for start, end in filter(None, spans))
            if inside and not supervise_reasoning:
                raise DataError(
                    f"dataset.supervise_reasoning: {self.name} has reasoning inside its {{% generation %}} tags; set "
                    "dataset.supervise_reasoning: true, or name a template in dataset.chat_template that tags it not"
                )
            if supervise_reasoning and not inside:
                raise DataError(
                    f"dataset.supervise_reasoning: {self.name} has reasoning outside its {{% generation %}} tags and "
                    "knows no variable supervise_reasoning; set dataset.supervise_reasoning: false, or name another "
                    "template in dataset.chat_template"
                )

    def _check_whole_answers(self, turns: list[Turn], wanted: list[range], spans: int) -> None:
        """Refuse reasoning that parts an answer: what stands before it would be learned as one that ends there."""
        inside = {number for answer in wanted for number in answer}
        bare = [with_reasoning(turn, "") if number in inside else turn for number, turn in enumerate(turns)]
        if spans > len(self._render(bare)[1]):
            raise DataError(
                f"dataset.supervise_reasoning: {self.name} has reasoning between assistant messages in a row, which "
                "are one answer, so what stands before it has no end to learn; set dataset.supervise_reasoning: true, "
                "or give the reasoning with the first of them"
            )

    def _unknown_answers(self, turns: list[Turn], supervise_reasoning: bool) -> str:
        # In the template's own words where it refuses a part of the conversation.
        for answer in answer_turns(self._text, turns):
            self._render(turns[: answer.start], add_generation_prompt=True)
            self._render(turns[: answer.stop])
        untagged = f"dataset.chat_template: {self.name} has no {{% generation %}} tags"
        if not supervise_reasoning and any(map(reasoning_of, turns)):
            return (
                f"{untagged}, and its renderings with and without reasoning do not show where the answer after it "
                "starts; set dataset.supervise_reasoning: true, or name a template with tags in dataset.chat_template"
            )
        if self._answers(turns, supervise_reasoning=supervise_reasoning)[1][-1]:
            return (
                f"{untagged} and renders an answer differently once more turns follow, so where the earlier answers "
                "of a conversation lie is unknown; set dataset.answers: one or last, or "
                f"{remedy().removeprefix('set ')}"
            )
        return (
            f"{untagged} and renders the turns before an answer differently once the answer follows, so where an "
            f"answer starts is unknown; {remedy()}"
        )

    def _answers(
        self, turns: list[Turn], add_generation_prompt: bool = False, supervise_reasoning: bool = False
    ) -> Rendered:
        """Return the rendered text and where the answers lie in it, None for one whose place is unknown."""
        text, spans = self._render(turns, add_generation_prompt, supervise_reasoning)
        if self.tagged:
            return text, spans
        return text, find_answers(self._text, text, turns, supervise_reasoning, self.form.tail)

    def _render(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False, supervise_reasoning: bool = False
    ) -> Rendered:
        """Return the text and, for a tagged template, the tagged stretches; those that touch are one."""
        try:
            rendered: Any = render_jinja_template(
                [list(turns)],
                chat_template=self.source,
                return_assistant_tokens_mask=self.tagged,
                tools=[dict(tool) for tool in self.tools] or None,
                add_generation_prompt=add_generation_prompt,
                supervise_reasoning=supervise_reasoning,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(f"dataset.chat_template: {self.name} refuses the conversation: {_reason(error)}") from None
        texts, spans = rendered
        return texts[0], _joined(spans[0]) if self.tagged else []

    def _marked(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        supervise_reasoning: bool = False,
        prompt: bool = False,
    ) -> Marked:
        turns = [_as_dict(message) for message in messages]
        render = partial(self._text, add_generation_prompt=prompt)
        return mark_controls(turns, self.controls, render, self.name, supervise_reasoning)

    def _text(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        return self._render(turns, add_generation_prompt)[0]

    def _tokenize(self, text: str, marked: Marked) -> list[int]:
        """Return the ids of a piece of text; markers become the text that they stand for, as plain characters."""
        return [token for piece in marked.pieces(text) for token in self._ids(piece)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _pieces(length: int, spans: Sequence[Span | None]) -> list[Span]:
    """Cut 0..length at both ends of every span."""
    cuts = sorted({0, length, *(cut for span in spans if span for cut in span)})
    return list(pairwise(cuts))


def _joined(spans: Sequence[Sequence[int]]) -> list[Span | None]:
    """Return stretches in order, those that touch as one: assistant turns in a row that the template joins."""
    joined: list[Span | None] = []
    for start, end in spans:
        last = joined[-1] if joined else None
        if last and last[1] == start:
            joined[-1] = (last[0], end)
        else:
            joined.append((start, end))
    return joined


def _as_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    return message.as_dict() if isinstance(message, Message) else dict(message)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _may_be_supervised(message: Message | Mapping[str, Any]) -> bool:
    return not (isinstance(message, Message) and message.supervised is False)
