"""Texts with blanks, as tokens: `{blank:N}` is N tokens to be filled in, `{{blank:N}}` the text `{blank:N}` itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unmask.data.renderings import literal_pieces
from unmask.errors import DataError, SamplingError
from unmask.models.registry import family_of
from unmask.sampling.engine.state import Template
from unmask.sampling.prompt_rows import is_row
from unmask.sampling.prompts import (
    asked,
    chat_of,
    check_vocabulary,
    controls_of,
    require_characters,
    shown,
    start_of_text,
    template_of,
)
from unmask.sampling.settings import SamplerSettings, check_remask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLANK = re.compile(r"\{\{(blank(?::[^{}]*)?)\}\}|\{blank(?::([^{}]*))?\}")
# Stands for a masked position where a text is hashed; no token id is so large.
_MASKED = 2**48


@dataclass(frozen=True)
class Blank:
    """A gap of `length` tokens."""

    length: int


@dataclass(frozen=True)
class BlankText:
    """A text with blanks, as tokens.

    What is sampled, `template`, is `ids` with what closes the text; a canvas is filled up with end of text, and what no
    blank's canvas sees is left out.
    """

    pieces: list[str | Blank]  # text, blank, text, …, text; texts may be empty
    context: list[int]  # what stands before the text: the turns of a chat, or the tokenizer's start of text
    before: list[int]  # the text's tokens before its first blank
    ids: list[int]  # those from there on; 0 in the blanks
    spans: list[tuple[int, int]]  # of each blank, its columns [start, end) in `ids`
    template: Template

    @property
    def prompt_ids(self) -> list[int]:
        """All before the first blank."""
        return self.context + self.before

    @property
    def hashed(self) -> list[int]:
        """All its tokens, with one number at masked positions: equal where texts ask for the same."""
        pairs = zip(self.template.answer_ids, self.template.masked, strict=True)
        return [*self.prompt_ids, *(_MASKED if masked else token for token, masked in pairs)]

    def whole(self, answer: list[int]) -> list[int]:
        """Return the text's tokens, with those of the blanks from an answer to `template`."""
        return self.before + (answer + self.ids[len(answer) :])[: len(self.ids)]

    def filled(self, fills: Sequence[str]) -> str:
        """Return the text as it was given, with texts in its blanks."""
        left = iter(fills)
        return "".join(next(left) if isinstance(piece, Blank) else piece for piece in self.pieces)


def has_blank(text: str) -> bool:
    """Say whether a blank is written in a text."""
    return any(found.group(1) is None for found in _BLANK.finditer(text))


def parse(text: str, label: str) -> list[str | Blank]:
    """Return a text as pieces: blanks and what stands between them, which may be empty.

    Raises:
        SamplingError: no blank, or one without a length of at least 1.
    """
    pieces: list[str | Blank] = [""]
    at = 0
    for found in _BLANK.finditer(text):
        escaped = "" if found.group(1) is None else f"{{{found.group(1)}}}"
        pieces[-1] = f"{pieces[-1]}{text[at : found.start()]}{escaped}"
        at = found.end()
        if not escaped:
            pieces += [_blank(found.group(), found.group(2), label), ""]
    pieces[-1] = f"{pieces[-1]}{text[at:]}"
    if len(pieces) == 1:
        raise SamplingError(f"{label}: there is no blank in it; write {{blank:N}} where N tokens are to be filled in")
    return pieces


def _blank(written: str, inside: str | None, label: str) -> Blank:
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*", inside or "")
    length = int(found.group(1)) if found else 0
    if length < 1:
        raise SamplingError(
            f"{label}: {written} needs a length of 1 to 999999999 tokens, as {{blank:4}}; for this text itself write "
            f"{{{written}}}"
        )
    return Blank(length)


def encode_blanks(
    texts: Sequence[Any],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    raw: bool,
    config: Any,
    settings: SamplerSettings,
) -> list[BlankText]:
    """Return the tokens of texts with blanks; what stands between blanks is tokenised apart.

    Arguments as in `infill`; unless a plain text is `raw`, what spells a control token, the mask included, is text.

    Raises:
        SamplingError: no blank, no tokenizer, half a surrogate pair, something else than a text or such a chat, one
            that does not fit the model, or that begins with a blank where a canvas needs something before it; `revise`
            that can do nothing in any of them.
    """
    found = []
    for label, text in zip(labels, texts, strict=True):
        pieces, context, parts = _tokenise(label, text, tokenizer, raw, config.mask_token_id)
        found.append(_lay_out(label, pieces, context, parts, config, settings))
    _check_revise(found, settings)
    return found


def _tokenise(
    label: str, text: Any, tokenizer: PreTrainedTokenizerBase | None, raw: bool, mask_id: int | None
) -> tuple[list[str | Blank], list[int], list[list[int]]]:
    """Return a text's pieces, the tokens before it, and those of each text among the pieces and of what closes it."""
    if tokenizer is None:
        raise SamplingError(f"{label}: it needs a tokenizer; pass tokenizer=unmask.load_tokenizer(...)")
    text = asked(label, text, infill=True)
    if isinstance(text, str):
        require_characters(text, label)
        pieces, closing = parse(text, label), []
        context = [] if raw else start_of_text(tokenizer)
        controls = None if raw else controls_of(tokenizer, mask_id)
    else:
        if not is_row(text) and not (
            isinstance(text, (list, tuple)) and all(isinstance(turn, Mapping) for turn in text)
        ):
            raise SamplingError(f"{label}: expected a text or a chat with blanks, got {shown(text)}")
        chat = chat_of(label, text, raw)
        messages = () if chat is None else chat.messages
        if chat is None or len(messages) < 2 or messages[-1].role != "assistant":
            raise SamplingError(
                f"{label}: a chat with blanks ends in the assistant's message, after at least one other"
            )
        pieces = parse(messages[-1].content, label)
        try:
            template = template_of(tokenizer, mask_id).with_tools(chat.tools)
            context = template.encode_prompt(messages[:-1])
            before, after = template.around_answer(messages[:-1])
        except DataError as error:
            raise SamplingError(f"{label}: {error}; or give a plain text") from None
        controls = template.controls
        context += tokenizer.encode(before, add_special_tokens=False)
        closing = tokenizer.encode(after, add_special_tokens=False)
    texts = [piece for piece in pieces if isinstance(piece, str)]
    split = [[text] if controls is None else literal_pieces(text, controls) for text in texts]
    parts = [[token for part in each for token in tokenizer.encode(part, add_special_tokens=False)] for each in split]
    return pieces, context, [*parts, closing]


def _lay_out(
    label: str,
    pieces: list[str | Blank],
    context: list[int],
    parts: list[list[int]],
    config: Any,
    settings: SamplerSettings,
) -> BlankText:
    before, *between, closing = parts
    blanks = [piece.length for piece in pieces if isinstance(piece, Blank)]
    canvas = family_of(config).attention == "canvas"
    if canvas and not context and not before:
        raise SamplingError(f"{label}: a canvas needs something before it; begin the text with a word, or give a chat")
    given = len(context) + len(before)
    least = given + sum(blanks) + sum(map(len, between[:-1]))
    _check_length(least, label, config, canvas)  # before anything of that size is made
    ids: list[int] = []
    masked: list[bool] = []
    spans: list[tuple[int, int]] = []
    for blank, piece in zip(blanks, between, strict=True):
        spans.append((len(ids), len(ids) + blank))
        ids += [0] * blank + piece
        masked += [True] * blank + [False] * len(piece)
    size = settings.block_size
    length = (spans[-1][1] - 1) // size * size + size if canvas else len(ids) + len(closing)
    _check_length(given + length, label, config, canvas)
    answer = [*ids, *closing, *[config.eos_token_id] * length][:length]
    check_vocabulary(label, [*context, *before, *answer], config)
    template = Template(answer, [*masked, *[False] * length][:length], [column // size for column in range(length)])
    return BlankText(pieces, context, before, ids, spans, template)


def _check_revise(texts: Sequence[BlankText], settings: Any) -> None:
    """Refuse to mask tokens again where it can do nothing in any of the texts."""
    problem = None
    for text in texts:
        pairs = zip(text.template.block_of, text.template.masked, strict=True)
        try:
            return check_remask(settings, list(Counter(block for block, masked in pairs if masked).values()))
        except SamplingError as error:
            problem = error
    if problem is not None:
        raise problem


def _check_length(total: int, label: str, config: Any, canvas: bool) -> None:
    most = config.max_sequence_length
    if total > most:
        whole = ", in whole canvases from the first blank," if canvas else ""
        raise SamplingError(
            f"{label}: {total} tokens{whole} are over the model's max_sequence_length {most}; shorten the text or its "
            "blanks"
        )
