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
    if tags is None:
        return [False] * len(token_ids)
    begin, end = tags
    inside, found = False, []
    for token in token_ids:
        inside = inside or token == begin
        found.append(inside or token == end)
        inside = inside and token != end
    return found


def split_reasoning(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Return an answer's text and its reasoning, without special tokens; None where it has no tags."""
    tags = reasoning_tags(tokenizer)
    inside = in_reasoning(token_ids, tags)
    said = [token for token, own in zip(token_ids, inside, strict=True) if not own]
    text = str(tokenizer.decode(said, skip_special_tokens=True))
    if tags is None or not any(inside):
        return text, None
    thought = [token for token, own in zip(token_ids, inside, strict=True) if own and token not in tags]
    return text, _NAME.sub("", str(tokenizer.decode(thought, skip_special_tokens=True))).strip()


def unanswered_note(text: str | None, reasoning: str | None) -> str | None:
    """Return what to say of a result that has reasoning and no answer; None of any other."""
    if not reasoning or text is None or text.strip():
        return None
    return "the answer's length was used up by reasoning; raise --max_new_tokens"
