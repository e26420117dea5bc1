"""From an answer's tokens to text: what is reasoning, what is said, and what a single token stands for. No torch.

DiffusionGemma writes its reasoning between two control tokens in front of the answer, and may write them around
nothing where it was not asked to think. Chat templates leave earlier reasoning out of a conversation, so it is no part
of an answer's text (source: the released chat template, which cuts it out of a turn by these tokens).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("<|channel>", "<channel|>")
# The first line says what the channel is for.
_NAME = re.compile(r"\A\s*thought\s*(?:\n|\Z)")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOST = "\N{REPLACEMENT CHARACTER}"
# Model text must not move the cursor or set the terminal's title: control characters become a sign.
_CONTROLS = {code: _LOST for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def reasoning_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return the tokens that reasoning begins and ends with; None where the vocabulary has none."""
    begin, end = (tokenizer.convert_tokens_to_ids(tag) for tag in TAGS)
    if not isinstance(begin, int) or not isinstance(end, int):
        return None
    # What is not in the vocabulary may come back as the unknown token.
    return (begin, end) if tokenizer.convert_ids_to_tokens([begin, end]) == list(TAGS) else None


def in_reasoning(token_ids: Sequence[int], tags: tuple[int, int] | None) -> list[bool]:
    """Return for each token whether it is reasoning or one of its tags; without an end it goes on to the last."""
    if tags is None:
        return [False] * len(token_ids)
    begin, end = tags
    inside, marks = False, []
    for token in token_ids:
        inside = inside or token == begin
        marks.append(inside or token == end)
        inside = inside and token != end
    return marks


def decoded(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], hidden: Collection[int] = (), special: bool = False
) -> str:
    """Return tokens as text, without `hidden` ones and, unless `special`, without special tokens."""
    shown = [token for token in token_ids if token not in hidden]
    return str(tokenizer.decode(shown, skip_special_tokens=not special))


def split_reasoning(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, hidden: Collection[int] = ()
) -> tuple[str, str | None]:
    """Return an answer's text and its reasoning, without special and `hidden` tokens; None where it has no tags."""
    tags = reasoning_tags(tokenizer)
    marks = in_reasoning(token_ids, tags)
    said = [token for token, thought in zip(token_ids, marks, strict=True) if not thought]
    text = decoded(tokenizer, said, hidden)
    if tags is None or not any(marks):
        return text, None
    thoughts = [token for token, thought in zip(token_ids, marks, strict=True) if thought and token not in tags]
    return text, _NAME.sub("", decoded(tokenizer, thoughts, hidden)).strip()


def end_of_answer(
    token_ids: Sequence[int], stops: Collection[int], masked: Sequence[bool], given: Collection[int]
) -> int:
    """Return where the first stop token stands that the sampler has committed, or the length: the answer ends there.

    A stop token at a position that is `masked` is not committed yet, and at one that was `given` it is text.
    """
    places = (i for i, token in enumerate(token_ids) if token in stops and not masked[i] and i not in given)
    return next(places, len(token_ids))


def unanswered_note(text: str | None, reasoning: str | None) -> str | None:
    """Return what to say of a result that has reasoning and no answer; None of any other."""
    if not reasoning or text is None or text.strip():
        return None
    return "the answer's length was used up by reasoning; raise --max_new_tokens"


def printable(text: str) -> str:
    """Return text without control characters that a terminal would obey; newlines and tabs stay."""
    return text.translate(_CONTROLS)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str | list[int]:
    """Return a token's text as it stands within a text, or its bytes (0 to 255) where they are no whole characters.

    Special tokens are spelt out. A token that the tokenizer does not know is its number in angle brackets.
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return f"⟨{token}⟩"
    # Some decoders take a space off the start of a text, so the token is decoded behind another one.
    once, twice = (
        str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for ids in ([token], [token, token])
    )
    text = twice[len(once) :] if twice.startswith(once) else once
    if _LOST not in text:
        return text
    byte = _BYTE.fullmatch(piece)
    if byte:
        return [int(byte[1], 16)]
    alphabet = byte_alphabet()
    if all(character in alphabet for character in piece):
        return [alphabet[character] for character in piece]
    return text


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves, the others, in order, are the characters from U+0100 on (Radford et
    al. 2019, GPT-2's encoder.py).
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}
