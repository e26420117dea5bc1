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
    begin, end = (tokenizer.convert_tokens_to_ids(tag) for tag in TAGS)
    if not isinstance(begin, int) or not isinstance(end, int):
        return None
    # What is not in the vocabulary may come back as the unknown token.
    return (begin, end) if tokenizer.convert_ids_to_tokens([begin, end]) == list(TAGS) else None


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
    kept: dict[bool, list[int]] = {False: [], True: []}
    for token, own in zip(token_ids, inside, strict=True):
        if tags is None or token not in tags:
            kept[own].append(token)
    text, thought = (str(tokenizer.decode(kept[part], skip_special_tokens=True)) for part in (False, True))
    return text, _NAME.sub("", thought).strip() if any(inside) else None


def unanswered_note(text: str | None, reasoning: str | None) -> str | None:
    """Return what to say of a result that has reasoning and no answer; None of any other."""
    if not reasoning or text is None or text.strip():
        return None
    return "the answer's length was used up by reasoning, which is not shown; raise --max_new_tokens"
