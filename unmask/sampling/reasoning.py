"""What a model thought before it answered. DiffusionGemma writes it between two control tokens, in front of the answer,
and may write them around nothing where it was not asked to think.

Chat templates leave earlier reasoning out of a conversation, so it is no part of an answer's text. Source: the released
chat template, which cuts it out of a turn by these tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("<|channel>", "<channel|>")
# The first line says what the channel is for.
_NAME = re.compile(r"\A\s*thought\s*(?:\n|\Z)")


def reasoning_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return the tokens that reasoning begins and ends with; None where the vocabulary has none."""
    known = tokenizer.get_vocab()
    return (known[TAGS[0]], known[TAGS[1]]) if all(tag in known for tag in TAGS) else None


def in_reasoning(token_ids: Sequence[int], tags: tuple[int, int] | None) -> list[bool]:
    """Return for each token whether it is reasoning or one of its tags; without an end it goes on to the last."""
    inside, found = False, []
    for token in token_ids:
        if tags is not None and token == tags[0]:
            inside = True
        found.append(inside or (tags is not None and token == tags[1]))
        if tags is not None and token == tags[1]:
            inside = False
    return found


def split_reasoning(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Return an answer's text and its reasoning, without special tokens; None where it has no tags."""
    tags = reasoning_tags(tokenizer)
    inside = in_reasoning(token_ids, tags)
    parts = ([token for token, own in zip(token_ids, inside, strict=True) if own is part] for part in (False, True))
    text, thought = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
    return text, _NAME.sub("", thought).strip() if any(inside) else None
