"""The chat template: how a conversation becomes tokens, and which of them training supervises.

Supervision belongs to the template. Where it has `{% generation %}` tags, the tagged text is supervised. Where it has
none, each assistant turn is found by rendering: what precedes the turn, with the generation prompt, must be the start
of what includes it; the rest of the turn, its closing token included, is supervised, its header never.

An answer is tokenised apart from the text before it, as at inference, where the prompt is tokens before the answer is
text. So no token straddles the two, and a header has the same tokens in training and in use also where a tokenizer
looks ahead (many make other tokens of "\\n\\n" before a letter than at the end of the text).

Control tokens come from the template alone. Where the text of a turn spells one (`<|eot_id|>`, the mask token, …), it
is encoded as ordinary characters, in training and in prompts alike, so no row can forge a turn or inject a mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from unmask.data.conversation import Message
from unmask.errors import DataError
from unmask.sections import nearest

# Private-use characters, which no tokenizer gives a meaning: they stand for a spelt-out control token while rendering.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKER = f"{_OPEN}[0-9]+{_CLOSE}"
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = "set dataset.chat_template: llada, or the path of a template with {% generation %} tags"
Span = tuple[int, int]  # characters [start, end) of a rendered text
Rendered = tuple[str, list[Span | None]]  # the text, and its stretches
_PROBE = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True))


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: token ids.
        supervised: for each token, whether it is part of an answer that training supervises.
    """

    ids: list[int]
    supervised: list[bool]


def template_names() -> list[str]:
    """Return the names of the templates that come with the package."""
    folder = resources.files("unmask.data") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def read_template(chat_template: str) -> str:
    """Return the source of a template: one of ours by name, or a file by path.

    Raises:
        DataError: neither a name of ours nor a readable file.
    """
    if chat_template in template_names():
        return (resources.files("unmask.data") / "templates" / f"{chat_template}.jinja").read_text("utf-8")
    try:
        return Path(chat_template).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = template_names()
        raise DataError(
            f"dataset.chat_template: {chat_template!r} is neither a readable file ({_reason(error)}) nor one of "
            f"our own: {', '.join(names)}{nearest(chat_template, names)}"
        ) from None


def load_template(
    tokenizer: Any, chat_template: str | None = None, control_ids: Sequence[int] = (), *, for_training: bool = True
) -> ChatTemplate:
    """Return the template that renders and supervises conversations for `tokenizer`.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: name of one of ours, or path of a .jinja file; None takes the tokenizer's own.
        control_ids: further ids that text must never spell, beside the tokenizer's special tokens (the model's mask).
        for_training: refuse a template that does not show where answers start; prompts do not need to know.

    Raises:
        DataError: no template, one that cannot be read, or (for training) one that does not show where answers start.
    """
    if chat_template is not None:
        source, name = read_template(chat_template), chat_template
    elif tokenizer.chat_template is None:
        raise DataError(f"dataset.chat_template: the tokenizer has no chat template; {_REMEDY}")
    else:
        try:
            source, name = tokenizer.get_chat_template(), "the tokenizer's chat template"
        except ValueError as error:
            raise DataError(f"dataset.chat_template: {_reason(error)}; {_REMEDY}") from None
    controls = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    controls.update(tokenizer.all_special_tokens)
    controls.update(token for token in tokenizer.convert_ids_to_tokens(list(control_ids)) if token)
    template = ChatTemplate(tokenizer, source, name, bool(_TAG.search(source)), _pattern(controls))
    if for_training:
        template.check()
    return template


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations and says which tokens are supervised; made by `load_template`.

    Attributes:
        tokenizer: a transformers tokenizer.
        source: the template's Jinja source.
        name: what messages call it.
        tagged: whether it has `{% generation %}` tags.
        controls: matches every control token that text may spell.
    """

    tokenizer: Any
    source: str
    name: str
    tagged: bool
    controls: re.Pattern[str]

    def render(self, messages: Sequence[Message | Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._render([_as_dict(message) for message in messages], add_generation_prompt)[0]

    def encode(self, messages: Sequence[Message | Mapping[str, Any]], mask_history: bool = False) -> Encoded:
        """Return the tokens of a conversation and which of them are supervised.

        Args:
            messages: the turns.
            mask_history: supervise the last assistant turn only.

        Raises:
            DataError: the template refuses the conversation, or does not show where its answers start.
        """
        turns, spelt = self._marked(messages)
        text, spans = self._answers(turns)
        supervised = spans[-1:] if mask_history else spans
        answers = sum(turn["role"] == "assistant" for turn in turns)
        if mask_history and len(spans) != answers:
            raise DataError(
                f"dataset.mask_history: {self.name} tags {len(spans)} stretches in {answers} assistant turns, so "
                "which belong to the last turn is unknown; set dataset.mask_history: false or tag each turn once"
            )
        if None in supervised:
            raise DataError(
                f"dataset.chat_template: {self.name} has no {{% generation %}} tags and renders the turns before an "
                f"answer differently once the answer follows, so where an answer starts is unknown; {_REMEDY}"
            )
        ids, flags = [], []
        for start, end in _pieces(len(text), spans):
            piece_ids = self._tokenize(text[start:end], spelt)
            ids += piece_ids
            flags += [any(span and span[0] <= start and end <= span[1] for span in supervised)] * len(piece_ids)
        return Encoded(ids, flags)

    def encode_prompt(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation up to where the assistant's next answer starts.

        Raises:
            DataError: the template refuses the conversation.
        """
        turns, spelt = self._marked(messages)
        text, spans = self._answers(turns, add_generation_prompt=True)
        pieces = _pieces(len(text), spans)
        return [token for start, end in pieces for token in self._tokenize(text[start:end], spelt)]

    def check(self) -> None:
        """Raise DataError if a plain conversation of two exchanges does not show which tokens are answers."""
        probe = [message.as_dict() for message in _PROBE]
        if not self.tagged and self._render(probe)[0] == self._render(probe, True)[0]:
            raise DataError(
                f"dataset.chat_template: {self.name} has no {{% generation %}} tags and renders the same with and "
                f"without a generation prompt, so it does not show where an answer starts; {_REMEDY}"
            )
        if not any(self.encode(_PROBE).supervised):
            raise DataError(f"dataset.chat_template: {self.name} supervises nothing; {_REMEDY}")

    def _answers(self, turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> Rendered:
        """Return the rendered text and where the answers lie in it, None for one that cannot be told."""
        text, spans = self._render(turns, add_generation_prompt)
        if self.tagged:
            return text, spans
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        return text, [self._turn_span(text, turns, number) for number in numbers]

    def _turn_span(self, text: str, turns: list[dict[str, Any]], number: int) -> Span | None:
        """Return where the answer of turn `number` lies in `text`, found by comparing renderings."""
        before = self._render(turns[:number], True)[0]
        through = self._render(turns[: number + 1])[0]
        if text.startswith(through) and through.startswith(before):
            return len(before), len(through)
        return None

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> Rendered:
        """Return the text and, for a tagged template, the tagged stretches."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [turns],
                chat_template=self.source,
                return_assistant_tokens_mask=self.tagged,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(f"dataset.chat_template: {self.name} refuses the conversation: {_reason(error)}") from None
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if self.tagged else []

    def _marked(self, messages: Sequence[Message | Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the turns with each spelt-out control token replaced by a marker, and the texts so replaced."""
        spelt: list[str] = []

        def mark(found: re.Match[str]) -> str:
            spelt.append(found.group())
            return f"{_OPEN}{len(spelt) - 1}{_CLOSE}"

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return self.controls.sub(mark, value)
            if isinstance(value, Mapping):
                return {key: marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, (list, tuple)) else value

        return [marked(_as_dict(message)) for message in messages], spelt

    def _tokenize(self, text: str, spelt: list[str]) -> list[int]:
        """Return the ids of a piece of text; markers become the text that they stand for, as plain characters."""
        ids = []
        for part in re.split(f"({_MARKER})", text) if spelt else [text]:
            if spelt and re.fullmatch(_MARKER, part):
                control = spelt[int(part[1:-1])]
                # Split after its first character, it is no longer the token that it spells.
                ids += self._ids(control[:1]) + self._ids(control[1:])
            elif part:
                ids += self._ids(part)
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _pieces(length: int, spans: Sequence[Span | None]) -> list[Span]:
    """Cut 0..length at both ends of every span."""
    cuts = sorted({0, length, *(cut for span in spans if span for cut in span)})
    return list(pairwise(cuts))


def _pattern(controls: set[str]) -> re.Pattern[str]:
    """Match any control token, the longest first, and our own markers, which text must not forge either."""
    words = sorted((word for word in controls if len(word) > 1), key=lambda word: (-len(word), word))
    return re.compile("|".join([_MARKER, *map(re.escape, words)]))


def _as_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    return message.as_dict() if isinstance(message, Message) else dict(message)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
