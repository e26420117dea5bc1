"""What a single token stands for: text, or, where it holds a part of a character only, bytes."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOST = "\N{REPLACEMENT CHARACTER}"


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
    found = _BYTE.fullmatch(piece)
    if found:
        return [int(found[1], 16)]
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
