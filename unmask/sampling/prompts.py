"""What a caller may give as prompts, in Python or in a JSONL file, and how each becomes token ids. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unmask.data.chat import ChatTemplate
from unmask.data.conversation import Conversation, Message, read_content, read_turns
from unmask.data.keys import RowProblem, is_blank
from unmask.data.renderings import control_pattern
from unmask.data.template_loading import load_template
from unmask.data.turns import special_words
from unmask.errors import ConfigError, DataError, SamplingError
from unmask.places import user_path
from unmask.sampling.prompt_rows import KEYS, is_row, read_prompts, read_row
from unmask.sampling.settings import SamplerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a JSON escape such as \ud83d without its other half decodes to, and no tokenizer or UTF-8 file takes.
_HALF_A_PAIR = "half a surrogate pair (\\ud800 to \\udfff), which is no character"


def as_list(prompts: Any) -> list[Any]:
    """Return the prompts as a list; a single text, chat or sequence of ids becomes a list of one.

    Raises:
        SamplingError: something that is neither a prompt nor a list of them.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = _plain(prompts)
    if not isinstance(items, (list, tuple)):
        raise SamplingError(f"prompts: expected texts, chats or lists of token ids, got {shown(prompts)}")
    single = len(items) > 0 and all(isinstance(item, (Mapping, int)) and not is_row(item) for item in items)
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
        prompts, tokenizer, labels: as in `generate`.
        raw: tokenize texts as they stand, control tokens spelt in them included. Nothing is put before them.
        mask_id: the model's mask, which the text of a chat cannot spell.

    Raises:
        SamplingError: no tokenizer for a text, an empty prompt, half a surrogate pair, a prompt of another kind, or a
            tokenizer whose chat template cannot render it.
    """
    items = [_plain(prompt) for prompt in as_list(prompts)]
    template: ChatTemplate | None = None
    encoded = []
    for label, item in zip(labels_of(len(items), "prompt", labels), items, strict=True):
        prompt = asked(label, item)
        if _is_ids(prompt):
            encoded.append(list(prompt))
            continue
        chat = chat_of(label, prompt, raw)
        if tokenizer is None:
            raise SamplingError(
                f"{label}: text needs a tokenizer; pass tokenizer=unmask.load_tokenizer(...) or give token ids"
            )
        if chat is None:
            ids = list(tokenizer.encode(prompt, add_special_tokens=False))
        else:
            try:
                template = template or template_of(tokenizer, mask_id)
                ids = template.with_tools(chat.tools).encode_prompt(chat.messages)
            except DataError as error:
                raise SamplingError(
                    f"{label}: {template_problem(error)}; use a tokenizer with another chat template, or give literal "
                    "text with raw"
                ) from None
        if not ids:
            raise SamplingError(f"{label}: the tokenizer makes no tokens of it; write some text")
        encoded.append(ids)
    return encoded


def check_prompts(
    prompts: Sequence[Sequence[int]], labels: Sequence[str], config: Any, settings: SamplerSettings
) -> None:
    """Refuse prompts, given as tokens, that do not fit a model together with their answers; raises SamplingError."""
    length = settings.length
    rounded = "" if length == settings.max_new_tokens else f" ({length // settings.block_size} whole canvases)"
    for label, ids in zip(labels, prompts, strict=True):
        if len(ids) > room_for(config, settings):
            raise SamplingError(
                f"{label}: {len(ids)} tokens and max_new_tokens={settings.max_new_tokens}{rounded} make "
                f"{len(ids) + length}, over the model's max_sequence_length {config.max_sequence_length}; shorten the "
                "prompt or the answer"
            )
        check_vocabulary(label, ids, config)


def room_for(config: Any, settings: SamplerSettings) -> int:
    """Return the longest prompt that fits a model together with an answer, in tokens; not positive where none does."""
    return config.max_sequence_length - settings.length


def check_vocabulary(label: str, ids: Sequence[int], config: Any) -> None:
    """Refuse a token that a model does not know; raises SamplingError."""
    outside = [token for token in ids if not 0 <= token < config.rows]
    if outside:
        raise SamplingError(
            f"{label}: token id {outside[0]} is outside the model's vocabulary of {config.rows}; use the tokenizer "
            "that belongs to the checkpoint"
        )


def title_of(prompt: Any, index: int) -> str:
    """Return what to print above an answer: the text, the last turn of a chat, or the number of a prompt of ids."""
    if isinstance(prompt, Mapping):
        prompt = next((prompt[key] for key in KEYS if prompt.get(key) is not None), None)
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if isinstance(prompt, (list, tuple)) and prompt else None
    if not isinstance(last, Mapping):
        return f"prompt {index + 1}"
    return read_content(last.get("content", last.get("value")) or "", "content")[0]


def template_of(tokenizer: PreTrainedTokenizerBase, mask_id: int | None, name: str | None = None) -> ChatTemplate:
    """Return the template that prompts are rendered with, the tokenizer's own or a named one; raises DataError."""
    return load_template(tokenizer, name, () if mask_id is None else (mask_id,), for_training=False)


def controls_of(tokenizer: PreTrainedTokenizerBase, mask_id: int | None) -> re.Pattern[str]:
    """Return what matches every control token that a text may spell, those of the tokenizer's own template included."""
    try:
        return template_of(tokenizer, mask_id).controls
    except DataError:  # none, or none that can be read: a plain text does without
        return control_pattern(special_words(tokenizer, () if mask_id is None else (mask_id,)))


def template_problem(error: DataError) -> str:
    """Return what is wrong with a chat template, without the remedy of those who train."""
    return re.split("; (?:set dataset|name (?:a|the) )", str(error).removeprefix("dataset.chat_template: "))[0]


def asked(label: str, prompt: Any, infill: bool = False) -> Any:
    """Return what a row asks (`prompt_rows.read_row`), any other prompt as it is; raises SamplingError."""
    if not isinstance(prompt, Mapping) or not is_row(prompt):
        return prompt
    try:
        return read_row(prompt, infill)
    except RowProblem as problem:
        raise SamplingError(f"{label}: {problem}; mend the prompt") from None


def chat_of(label: str, prompt: Any, raw: bool) -> Conversation | None:
    """Return as a chat what `asked` gave, None for literal text; raises SamplingError for what is neither."""
    if isinstance(prompt, str):
        if is_blank(prompt):
            raise SamplingError(f"{label}: the text is empty; write what the model should answer")
        require_characters(prompt, label)
        return None if raw else Conversation((Message("user", prompt),))
    turns, tools = (prompt["messages"], prompt["tools"]) if is_row(prompt) else (prompt, ())
    if isinstance(turns, (list, tuple)) and not turns:
        raise SamplingError(f"{label}: the list is empty; give at least one token id or message")
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise SamplingError(f"{label}: expected text, messages or token ids, got {shown(prompt)}")
    if raw:
        raise SamplingError(f"{label}: a chat goes through the chat template; leave raw out, or give text")
    try:
        return Conversation(read_turns([dict(turn) for turn in turns], "messages", prompt=True), tuple(tools))
    except RowProblem as problem:
        raise SamplingError(f"{label}: {problem}; mend the turn") from None


def require_characters(text: str, label: str) -> None:
    """Refuse half a surrogate pair; raises SamplingError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SamplingError(f"{label} holds {_HALF_A_PAIR}; mend the text") from None


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer puts before a document: a list of one, or empty when it puts none."""
    start = tokenizer.encode("")[:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def as_document(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text with what the tokenizer puts before a document, where they do not begin with it."""
    start = start_of_text(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_ids(prompt: Any) -> bool:
    is_list = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return is_list and all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)


def _plain(prompt: Any) -> Any:
    """Return tensors and arrays as lists, everything else as it is."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def given_prompts(texts: Sequence[str] | None, file: str | None, infill: bool = False) -> dict[str, Any]:
    """Return the prompts of `--prompt` or of `--input` by their labels; `infill` and errors as in `read_prompts`.

    Raises:
        ConfigError: neither or both are given.
        SamplingError: an empty text.
    """
    if file is None and texts is None:
        raise ConfigError("give --prompt TEXT, once or several times, or --input FILE.jsonl")
    if file is not None and texts is not None:
        raise ConfigError("--prompt and --input: prompts come from one of them; leave the other out")
    if file is not None:
        return read_prompts(user_path(file, "--input"), infill)
    if not all(text.strip() for text in texts or ()):
        raise SamplingError("--prompt: the text is empty; write what the model should answer")
    return {f"prompt {index}": text for index, text in enumerate(texts or ())}
