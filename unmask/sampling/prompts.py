"""What a caller may give as prompts, and how each becomes token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from unmask.data.controls import PROBE, control_pattern
from unmask.errors import DataError, SamplingError
from unmask.sampling.blanks import Blank, parse
from unmask.sampling.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unmask.data.chat import ChatTemplate

# What a JSON escape such as \ud83d without its other half decodes to, and no tokenizer or UTF-8 file takes.
HALF_A_PAIR = "half a surrogate pair (\\ud800 to \\udfff), which is no character"


def as_list(prompts: Any) -> list[Any]:
    """Return the prompts as a list; a single text, chat or sequence of ids becomes a list of one.

    Raises:
        SamplingError: something that is neither a prompt nor a list of them.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = _plain(prompts)
    if not isinstance(items, (list, tuple)):
        raise SamplingError(f"prompts: expected texts, chats or lists of token ids, got {_shown(prompts)}")
    single = len(items) > 0 and all(isinstance(item, (Mapping, int)) for item in items)
    return [items] if single else list(items)


def labels_of(count: int, name: str, labels: Sequence[str] | None = None) -> Sequence[str]:
    """Return what messages call each of some prompts: what the caller does, or `NAME NUMBER`, from 0.

    Raises:
        SamplingError: another number of labels.
    """
    if labels is None:
        return [f"{name} {index}" for index in range(count)]
    if len(labels) != count:
        raise SamplingError(f"labels: {len(labels)} for {count} prompts; give one each, or leave them out")
    return labels


def encode_prompts(
    prompts: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    raw: bool = False,
    mask_id: int | None = None,
    labels: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        prompts: a prompt or a list of prompts. A text is one user turn, or literal text with `raw`; a list of
            {"role", "content"} is a chat; a list of integers is token ids.
        tokenizer: needed for texts and chats.
        raw: tokenize texts as they stand, control tokens spelt in them included. Nothing is put before them.
        mask_id: the model's mask, which the text of a chat cannot spell.
        labels: what messages call each prompt; None = `prompt NUMBER`, from 0.

    Raises:
        SamplingError: no tokenizer for a text, an empty prompt, half a surrogate pair, a prompt of another kind, or a
            tokenizer whose chat template cannot render it.
    """
    items = [_plain(prompt) for prompt in as_list(prompts)]
    template: ChatTemplate | None = None
    encoded = []
    for where, prompt in zip(labels_of(len(items), "prompt", labels), items, strict=True):
        if _is_ids(prompt):
            encoded.append(list(prompt))
            continue
        messages = _messages(where, prompt, raw)
        if tokenizer is None:
            raise SamplingError(
                f"{where}: text needs a tokenizer; pass tokenizer=unmask.load_tokenizer(...) or give token ids"
            )
        if messages is None:
            ids = list(tokenizer.encode(prompt, add_special_tokens=False))
        else:
            try:
                template = template or _template(tokenizer, mask_id)
                ids = template.encode_prompt(messages)
            except DataError as error:
                raise SamplingError(
                    f"{where}: {template_problem(error)}; use a tokenizer with another chat template, or give literal "
                    "text with raw"
                ) from None
        if not ids:
            raise SamplingError(f"{where}: the tokenizer makes no tokens of it; write some text")
        encoded.append(ids)
    return encoded


def check_prompts(prompts: Sequence[Sequence[int]], labels: Sequence[str], config: Any, settings: Settings) -> None:
    """Refuse prompts that do not fit a model together with their answers.

    Args:
        prompts: their tokens.
        labels: what messages call each.
        config: of the model.
        settings: in force.

    Raises:
        SamplingError: one is too long, or has a token that the model does not know.
    """
    length, most = settings.length, config.max_sequence_length
    rounded = "" if length == settings.max_new_tokens else f" ({length // settings.block_size} whole canvases)"
    for label, ids in zip(labels, prompts, strict=True):
        if len(ids) + length > most:
            raise SamplingError(
                f"{label}: {len(ids)} tokens and max_new_tokens={settings.max_new_tokens}{rounded} make "
                f"{len(ids) + length}, over the model's max_sequence_length {most}; shorten the prompt or the answer"
            )
        check_vocabulary(label, ids, config)


def check_vocabulary(label: str, ids: Sequence[int], config: Any) -> None:
    """Refuse a token that a model does not know; raises SamplingError."""
    outside = [token for token in ids if not 0 <= token < config.rows]
    if outside:
        raise SamplingError(
            f"{label}: token id {outside[0]} is outside the model's vocabulary of {config.rows}; use the tokenizer "
            "that belongs to the checkpoint"
        )


def title_of(prompt: Any, index: int) -> str:
    """Return what to call a prompt: its text, the last turn of a chat, or its number where it is token ids."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if isinstance(prompt, (list, tuple)) and prompt else None
    return str(last.get("content")) if isinstance(last, Mapping) else f"prompt {index + 1}"


def template_problem(error: DataError) -> str:
    """Return what is wrong with a chat template, without the remedy of those who train."""
    return str(error).removeprefix("dataset.chat_template: ").partition("; set dataset.chat_template")[0]


def _messages(where: str, prompt: Any, raw: bool) -> list[dict[str, Any]] | None:
    """Return a prompt's chat messages, or None for literal text; refuse what is neither."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise SamplingError(f"{where}: the text is empty; write what the model should answer")
        _require_characters(prompt, where)
        return None if raw else [{"role": "user", "content": prompt}]
    if isinstance(prompt, (list, tuple)) and not prompt:
        raise SamplingError(f"{where}: the list is empty; give at least one token id or message")
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise SamplingError(f"{where}: expected text, messages or token ids, got {_shown(prompt)}")
    if raw:
        raise SamplingError(f"{where}: a chat goes through the chat template; leave raw out, or give text")
    for number, turn in enumerate(prompt):
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise SamplingError(f"{where}: message {number} needs the texts 'role' and 'content', got {_shown(turn)}")
    if not any(turn["content"].strip() for turn in prompt):
        raise SamplingError(f"{where}: every message is empty; write what the model should answer")
    for number, turn in enumerate(prompt):
        for key, value in turn.items():
            if isinstance(value, str):
                _require_characters(value, f"{where}: message {number}.{key}")
    return [dict(turn) for turn in prompt]


def _require_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SamplingError(f"{where} holds {HALF_A_PAIR}; mend the text") from None


@dataclass(frozen=True)
class GivenText:
    """A text with blanks, as tokens.

    Attributes:
        prompt_ids: what stands before it: the turns of a chat, or the tokenizer's start of text.
        pieces: text, blank, text, …, text; texts may be empty.
        ids: the tokens of each text among the pieces, one more than there are blanks.
        closing: tokens that end it: the end of the assistant's turn in a chat.
    """

    prompt_ids: list[int]
    pieces: list[str | Blank]
    ids: list[list[int]]
    closing: list[int]

    @property
    def blanks(self) -> list[Blank]:
        """The blanks among the pieces."""
        return [piece for piece in self.pieces if isinstance(piece, Blank)]


def encode_given(
    where: str, text: Any, tokenizer: PreTrainedTokenizerBase | None, raw: bool = False, mask_id: int | None = None
) -> GivenText:
    """Return the tokens of a text with blanks (`blanks.parse`), its pieces tokenized apart.

    Args:
        where: what messages call it.
        text: a plain text, or a chat whose last message is the assistant's and has the blanks.
        tokenizer: needed.
        raw: control tokens that a plain text spells are tokens, and nothing is put before it. Otherwise what spells
            one, the mask included, is text.
        mask_id: the model's mask.

    Raises:
        SamplingError: no blank, no tokenizer, half a surrogate pair, or something else than a text or such a chat.
    """
    if tokenizer is None:
        raise SamplingError(f"{where}: it needs a tokenizer; pass tokenizer=unmask.load_tokenizer(...)")
    if isinstance(text, str):
        _require_characters(text, where)
        pieces = parse(text, where)
        if raw:
            ids = [list(tokenizer.encode(part, add_special_tokens=False)) for part in pieces if isinstance(part, str)]
            return GivenText([], pieces, ids, [])
        controls = _controls(tokenizer, mask_id)
        ids = [_literal_ids(tokenizer, part, controls) for part in pieces if isinstance(part, str)]
        return GivenText(start_of_text(tokenizer), pieces, ids, [])
    if not (isinstance(text, (list, tuple)) and all(isinstance(turn, Mapping) for turn in text)):
        raise SamplingError(f"{where}: expected a text or a chat with blanks, got {_shown(text)}")
    messages = _messages(where, text, raw) or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SamplingError(f"{where}: a chat with blanks ends in the assistant's message, after at least one other")
    pieces = parse(messages[-1]["content"], where)
    try:
        template = _template(tokenizer, mask_id)
        prompt_ids = template.encode_prompt(messages[:-1])
        rendered = template.render([*messages[:-1], {"role": "assistant", "content": PROBE}])
    except DataError as error:
        raise SamplingError(f"{where}: {error}; or give a plain text") from None
    ids = [_literal_ids(tokenizer, part, template.controls) for part in pieces if isinstance(part, str)]
    return GivenText(prompt_ids, pieces, ids, tokenizer.encode(rendered.partition(PROBE)[2], add_special_tokens=False))


def _controls(tokenizer: PreTrainedTokenizerBase, mask_id: int | None) -> re.Pattern[str]:
    words = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    mask = None if mask_id is None else tokenizer.convert_ids_to_tokens(mask_id)
    return control_pattern({*words, *tokenizer.all_special_tokens, *([mask] if isinstance(mask, str) else [])})


def _literal_ids(tokenizer: PreTrainedTokenizerBase, text: str, controls: re.Pattern[str]) -> list[int]:
    """Return the tokens of a text in which a spelt control token is characters: it is split after its first."""
    cuts = [0, *(found.start() + 1 for found in controls.finditer(text)), len(text)]
    parts = (text[start:end] for start, end in pairwise(cuts) if start < end)
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer puts before a document: a list of one, or empty when it puts none."""
    start = tokenizer.encode("")[:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def as_document(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text with what the tokenizer puts before a document, where they do not begin with it."""
    start = start_of_text(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def _template(tokenizer: PreTrainedTokenizerBase, mask_id: int | None) -> ChatTemplate:
    from unmask.data.chat import load_template

    return load_template(tokenizer, control_ids=() if mask_id is None else (mask_id,), for_training=False)


def _is_ids(prompt: Any) -> bool:
    is_list = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return is_list and all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)


def _plain(prompt: Any) -> Any:
    """Return tensors and arrays as lists, everything else as it is."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
