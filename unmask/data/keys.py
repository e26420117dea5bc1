"""The keys of rows, turns and parts of a text that change what a row teaches, and why each is refused if not read.

The names come from OpenAI's fine-tuning format, TRL, LLaMA-Factory, axolotl, ms-swift, ShareGPT and LLaVA. A key in
none of these lists (`id`, `source`, …) changes nothing that we know of: it is left out, and the number of rows that
have it is printed.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any


class RowProblem(ValueError):
    """A raw row that is no conversation; the text says why, as the end of a sentence that starts with the row's place.

    Attributes:
        key: leaving out this key would let the row be read; None where that is no remedy.
    """

    def __init__(self, text: str, key: str | None = None) -> None:
        super().__init__(text)
        self.key = key

    def remedy(self, where: str) -> str:
        """Return what a user can do; `where` names the section that the row comes from."""
        leave_out = f"set {where}.ignore_keys: [{self.key}] to leave the key out, " if self.key else ""
        return f"{leave_out}fix the row or set {where}.on_malformed: skip"


# What data sets and chat templates call the reasoning of a turn.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys of a turn that say whether it is trained on → whether 1 and true mean that it is.
FLAGS = {
    "weight": True, "loss_weight": True, "train": True, "training": True, "trainable": True, "loss": True,
    "loss_mask": True, "masked": False,
}  # fmt: skip
# What data sets call a row's system text.
SYSTEM = ("system", "system_prompt", "system_message")

_MEDIA = (
    "image", "images", "image_url", "image_urls", "image_path", "image_paths", "video", "videos", "video_url",
    "video_path", "audio", "audios", "audio_url", "audio_path", "input_audio", "pixel_values", "objects",
)  # fmt: skip
# Why it is refused, as the end of "the row has 'KEY', …" → the keys.
_KEYS_BY_REASON = {
    "and training takes text alone": _MEDIA,
    "which compares or judges answers, and training takes every answer as right": (
        "chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "preferred_output",
        "non_preferred_output", "label", "labels", "kto_tag", "completions", "positive_messages", "negative_messages",
    ),
    "which weights or masks what is learned; turns can say so of themselves, with weight: 0 or 1": (
        *FLAGS, "sample_weight", "loss_scale", "mask", "train_on_inputs", "train_on_input", "train_detail",
        "training_detail", "ignore_loss", "is_masked", "train_on_turn",
    ),
    "and the text would lack it; write it into a turn": (
        "context", "contexts", "documents", "choices", "options", "passage", "suffix", "prefix", "history", "channel",
        "recipient", "refusal", "system_instruction",
    ),
    "which is about tools; give `tools` of the row and `tool_calls` of a turn": (
        "tools", "functions", "tool_choice", "tool_calls", "function_call",
    ),
    "which sets the chat template; set it for all rows, with chat_template_kwargs": (
        "chat_template_kwargs", "chat_template", "enable_thinking", "add_generation_prompt", "continue_final_message",
    ),
    "which is reasoning; give it as reasoning_content of the answer's turn": (
        *REASONING, "thinking_blocks", "reasoning_details", "thought", "thoughts", "rationale", "chain_of_thought",
        "cot",
    ),
    "which are tokens, and the run's own tokenizer makes them from text": (
        "input_ids", "attention_mask", "token_ids", "prompt_ids", "completion_ids", "completion_mask",
        "assistant_masks", "position_ids", "special_tokens_mask",
    ),
    "which is a conversation of another format": (
        "messages", "conversations", "conversation", "dialog", "dialogue", "segments", "prompt", "completion",
        "instruction", "input", "output", "query", "response", "text", *SYSTEM,
    ),
}  # fmt: skip
# Characters that show nothing though Unicode says printable: Hangul fillers, the blank Braille cell, variation
# selectors, the combining grapheme joiner.
_INVISIBLE = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f" + "".join(map(chr, range(0xFE00, 0xFE10))))
# key → why it is refused; of a key in two lists the first counts
REFUSED_KEYS = {key: why for why, keys in reversed(_KEYS_BY_REASON.items()) for key in keys}


def is_given(value: object) -> bool:
    """Return whether a value says anything; null, blank text and containers of only these do not, False and 0 do."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif item is not None and not (isinstance(item, str) and is_blank(item)):
            return True
    return False


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: only spaces, fillers, control and format characters such as U+200B."""
    visible = text.strip()
    return not visible or (
        (visible[0] in _INVISIBLE or not visible[0].isprintable())
        and all(c.isspace() or c in _INVISIBLE or unicodedata.category(c) in ("Cf", "Cc") for c in visible)
    )


def unread_keys(holder: Mapping[str, Any], read: Collection[str], place: str = "") -> tuple[str, ...]:
    """Return the keys of a row, a turn or a part that say something and are not in `read`.

    Raises:
        RowProblem: one of them changes what the row teaches (`REFUSED_KEYS`).
    """
    unread = tuple(key for key, value in holder.items() if key not in read and is_given(value))
    for key in unread:
        if key in REFUSED_KEYS:
            raise RowProblem(f"{place} has {key!r}, {REFUSED_KEYS[key]}", key)
    return unread


def json_type(value: object) -> str:
    """Return the JSON type of a value in words, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    names[bytes] = "bytes that are not UTF-8"  # tables.py has decoded the others
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def read_object(members: list[tuple[str, object]]) -> dict[str, object]:
    """Return the dict of a JSON object's members: an `object_pairs_hook` that refuses repeated keys (RowProblem)."""
    made = dict(members)
    if len(made) != len(members):
        twice, _ = Counter(key for key, _ in members).most_common(1)[0]
        raise RowProblem(f"the key {twice!r} is given twice in one object, and which value is meant is unknown")
    return made
