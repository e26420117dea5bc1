"""`ChatTemplate` turns a conversation into tokens, and says which of them training supervises.

Supervision: the text within the template's `{% generation %}` tags. Without tags, each assistant turn is found by
comparing renderings (`renderings.py`): its closing token is supervised, its header never, its reasoning if asked for.

Tokenising: an answer is tokenised apart from the text before it, because at inference the prompt is tokenised before
there is an answer. So no token straddles the two, and a header has the same tokens in training and at inference. Many
tokenizers encode "\\n\\n" before a letter otherwise than at the end of a text.

Control tokens (the tokenizer's special tokens and those that the template writes around turns, see `turns.py`) come
from the template alone. Where the text of a turn spells one (`<|eot_id|>`, the mask token, …), it is encoded as
ordinary characters, in training and in prompts, so no row can forge a turn or inject a mask. What a template itself
removes from a turn, such as reasoning spelt within an answer, stays removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from unmask.data.conversation import Message
from unmask.data.renderings import (
    PROBE,
    Marked,
    Turn,
    answer_turns,
    cut_at,
    find_answers,
    joined,
    literal_pieces,
    mark_controls,
    reasoning_of,
)
from unmask.data.shown import (
    CHANGED_TEXT,
    UNREAD_KEY,
    UNTAGGED,
    Shape,
    check_shown,
    more_keys,
    shape_of,
    text_of,
    with_probes,
)
from unmask.data.supervision import (
    Rendered,
    check_tagged_reasoning,
    check_whole_answers,
    spans_of_answers,
    unknown_answers,
)
from unmask.data.template_bounds import TEMPLATE_ERRORS, bounded_rendering
from unmask.data.template_source import words_of
from unmask.data.turns import AnswerForm, answer_form
from unmask.errors import DataError

_SHAPES = 4096  # most shapes of conversations in the cache


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        supervised: for each token, whether training learns it.
        notes: what the tokens lack of the conversation, in the same words for every conversation.
    """

    ids: list[int]
    supervised: list[bool]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations and says which tokens are supervised; made by `template_loading.load_template`.

    Attributes:
        source: the template's Jinja source.
        name: what messages call it.
        tagged: whether it has `{% generation %}` tags.
        controls: matches every control token that the text of a turn might spell.
        turn_ids: the tokens that the template writes around the texts of turns, special or not.
        tools: what the assistant may call.
        shapes: a cache: the shape of a conversation → notes on what its text lacks (`shown.py`).
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
        return answer_form(self.tokenizer, self.render, self.turn_ids)

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
        """Return whether the template may read a key of a turn: its source has the word."""
        return key in words_of(self.source)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation; DataError when the template refuses it."""
        return self.render_spans([_as_dict(message) for message in messages], add_generation_prompt)[0]

    def answers(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[range]:
        """Return the numbers of the turns of each answer that may be supervised, in order.

        Assistant turns in a row are one answer where the template writes them as one.

        Raises:
            DataError: one answer has turns that may be supervised and others that may not.
        """
        allowed = []
        for answer in answer_turns(self.render, [_as_dict(message) for message in messages]):
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
        self.render_spans(turns, supervise_reasoning=supervise_reasoning)
        self._check_shown(turns, False, supervise_reasoning)

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        last_only: bool = False,
        supervise_reasoning: bool = False,
    ) -> Encoded:
        """Return the tokens of a conversation up to its last supervised one, and which of them are supervised.

        Turns after the last answer that may be supervised are not rendered, so nothing about the answer depends on
        them. Without such an answer everything is rendered, and nothing supervised.

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
        self._check_tools(text)
        if not all(map(marked.restored(text).__contains__, map(text_of, map(_as_dict, messages[: len(turns)])))):
            notes = (*notes, CHANGED_TEXT)
        if self.tagged and len(spans) < len(wanted):
            notes = (*notes, UNTAGGED)
        render = self.render_spans
        supervised = spans_of_answers(render, turns, spans, wanted, supervise_reasoning, self.name)
        if None in supervised:
            raise DataError(unknown_answers(render, turns, spans, supervise_reasoning, self.name))
        if self.tagged and any(map(reasoning_of, turns)):
            check_tagged_reasoning(render, turns, supervise_reasoning, self.name)
            check_whole_answers(render, turns, spans, wanted, self.name)
        end = max((span[1] for span in supervised if span), default=len(text))
        ids, flags = [], []
        for start, stop in cut_at(spans, end):
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
        self._check_tools(text)
        return [piece for start, end in cut_at(spans, len(text)) for piece in marked.pieces(text[start:end])]

    def literal_pieces(self, text: str) -> list[str]:
        """Return the text of a turn in pieces that spell no control token, to be tokenised apart."""
        return literal_pieces(text, self.controls)

    def around_answer(self, messages: Sequence[Message | Mapping[str, Any]]) -> tuple[str, str]:
        """Return what the template writes between a prompt and the text of its answer, and behind that text."""
        turns = [_as_dict(message) for message in messages]
        prompt = self.render_spans(turns, add_generation_prompt=True)[0]
        before, _, after = self.render_spans([*turns, {"role": "assistant", "content": PROBE}])[0].partition(PROBE)
        return before.removeprefix(prompt) if before.startswith(prompt) else "", after

    def _check_shown(
        self, turns: list[Turn], add_generation_prompt: bool, supervise_reasoning: bool = False
    ) -> tuple[str, ...]:
        """Return notes on what the text lacks of the conversation; DataError if it lacks what it must have."""
        # A key that the template does not mention cannot change its text.
        turns = [{key: turn[key] for key in turn if key not in more_keys(turn) or self.knows(key)} for turn in turns]
        shape = (add_generation_prompt, bool(self.tools), supervise_reasoning, shape_of(turns))
        if len(self.shapes) > _SHAPES:
            self.shapes.clear()
        if shape not in self.shapes:
            probed = with_probes(turns)
            text, spans = self._answers(probed, add_generation_prompt, supervise_reasoning)
            if self.tools and text == replace(self, tools=()).render(probed, add_generation_prompt):
                raise DataError(self._hidden_tools())
            keys = dict.fromkeys(key for turn in turns for key in more_keys(turn))
            unread = [UNREAD_KEY.format(key) for key in keys if not self._reads(key, probed, add_generation_prompt)]
            shown = check_shown(turns, text, None if add_generation_prompt else spans, self.name)
            self.shapes[shape] = (*shown, *unread)
        return self.shapes[shape]

    def _check_tools(self, text: str) -> None:
        """Refuse a template that shows some of the tools only."""
        functions = [tool["function"] for tool in self.tools]
        if not all(str(each.get("name", "")) in text for each in functions if isinstance(each, Mapping)):
            raise DataError(self._hidden_tools())

    def _hidden_tools(self) -> str:
        return (
            f"dataset.chat_template: {self.name} does not show the row's tools, all of them; name a template that "
            "renders them, or set dataset.ignore_keys: [tools]"
        )

    def _reads(self, key: str, turns: list[Turn], add_generation_prompt: bool) -> bool:
        """Return whether a key of the turns changes their text."""
        less = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        try:
            return self.render(less, add_generation_prompt) != self.render(turns, add_generation_prompt)
        except DataError:  # the template insists on it
            return True

    def _answers(
        self, turns: list[Turn], add_generation_prompt: bool = False, supervise_reasoning: bool = False
    ) -> Rendered:
        """Return the rendered text and where the answers lie in it, None for one whose place is unknown."""
        text, spans = self.render_spans(turns, add_generation_prompt, supervise_reasoning)
        if self.tagged:
            return text, spans
        return text, find_answers(self.render, text, turns, supervise_reasoning, self.form.tail)

    def render_spans(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False, supervise_reasoning: bool = False
    ) -> Rendered:
        """Return the text and, for a tagged template, the tagged stretches; those that touch are one."""
        try:
            with bounded_rendering():
                rendered: Any = render_jinja_template(
                    [list(turns)],
                    chat_template=self.source,
                    return_assistant_tokens_mask=self.tagged,
                    tools=[dict(tool) for tool in self.tools] or None,
                    add_generation_prompt=add_generation_prompt,
                    supervise_reasoning=supervise_reasoning,
                    **self.tokenizer.special_tokens_map,
                )
        except TEMPLATE_ERRORS as error:
            raise DataError(f"dataset.chat_template: {self.name} refuses the conversation: {_reason(error)}") from None
        texts, spans = rendered
        return texts[0], joined(spans[0]) if self.tagged else []

    def _marked(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        supervise_reasoning: bool = False,
        prompt: bool = False,
    ) -> Marked:
        turns = [_as_dict(message) for message in messages]
        render = partial(self.render, add_generation_prompt=prompt)
        return mark_controls(turns, self.controls, render, self.name, supervise_reasoning)

    def _tokenize(self, text: str, marked: Marked) -> list[int]:
        """Return the ids of a piece of text; markers become the text that they stand for, as plain characters."""
        return [token for piece in marked.pieces(text) for token in self._ids(piece)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _as_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    return message.as_dict() if isinstance(message, Message) else dict(message)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _may_be_supervised(message: Message | Mapping[str, Any]) -> bool:
    return not (isinstance(message, Message) and message.supervised is False)
