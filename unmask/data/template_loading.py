"""Loads a chat template for a tokenizer, and refuses one that training cannot use.

Whether training can use it shows in how it renders one plain exchange. What it makes of longer conversations shows when
a row has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unmask.data.chat import ChatTemplate, Encoded
from unmask.data.conversation import Message
from unmask.data.renderings import PROBE, control_pattern
from unmask.data.template_source import read_template, remedy, template_names, with_variables
from unmask.data.turns import MARKUP, STARTS, special_words, turn_tokens
from unmask.errors import DataError

_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CONTROL = re.compile(r"<\|\w+\|?>|<\w+\|>")  # how control tokens look in our own templates
_PROBE = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True))


def load_template(
    tokenizer: Any,
    chat_template: str | None = None,
    control_ids: Sequence[int] = (),
    *,
    variables: Mapping[str, Any] | None = None,
    supervise_reasoning: bool = False,
    for_training: bool = True,
) -> ChatTemplate:
    """Return the template that renders and supervises conversations for `tokenizer`.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: name of one of ours, or path of a .jinja file; None takes the tokenizer's own.
        control_ids: further ids that text must never spell (the model's mask), beside special tokens and those that the
            template writes around turns.
        variables: what the template's own variables are, such as enable_thinking.
        supervise_reasoning: refuse a template that renders no reasoning, or does not show where it is.
        for_training: refuse a template that does not show where answers start; prompts do not need to know.

    Raises:
        DataError: no template, one that cannot be read or does not know a variable, one of ours for another family's
            tokenizer, or (for training) one that does not show where answers start.
    """
    if chat_template is not None:
        source, name = read_template(chat_template), chat_template
    elif tokenizer.chat_template is None:
        raise DataError(f"dataset.chat_template: the tokenizer has no chat template; {remedy()}")
    else:
        try:
            source, name = tokenizer.get_chat_template(), "the tokenizer's chat template"
        except ValueError as error:
            raise DataError(f"dataset.chat_template: {' '.join(str(error).split())}; {remedy()}") from None
    source = with_variables(source, variables or {}, name)
    special = special_words(tokenizer, control_ids)
    template = ChatTemplate(tokenizer, source, name, bool(_TAG.search(source)), control_pattern(special))
    turn = turn_tokens(tokenizer, template.render)
    template = replace(template, controls=control_pattern(special.union(turn.values())), turn_ids=frozenset(turn))
    if chat_template in template_names():
        _check_vocabulary(template)
    if for_training:
        check_answer(template, supervise_reasoning)
    return template


def _check_vocabulary(template: ChatTemplate) -> None:
    """Refuse a template of ours whose control tokens the tokenizer would spell out in characters."""
    written = dict.fromkeys(_CONTROL.findall(template.render(_PROBE)))
    unknown = [token for token in written if len(template.tokenizer.encode(token, add_special_tokens=False)) != 1]
    if unknown:
        raise DataError(
            f"dataset.chat_template: {template.name} writes {', '.join(unknown)}, which this tokenizer has not among "
            "its tokens, so they would be spelt out as text; name the template of the model's family (one of "
            f"{', '.join(template_names())}), or in dataset.tokenizer the tokenizer of the template's"
        )


def check_answer(template: ChatTemplate, supervise_reasoning: bool = False) -> None:
    """Raise DataError if an exchange does not show which of its tokens are the answer.

    With `supervise_reasoning`, so it must of an answer that has reasoning.
    """
    turns = _exchange(template)
    text = template.render(turns)
    if not template.tagged and not template.form.shows_start:
        raise DataError(
            f"dataset.chat_template: {template.name} has no {{% generation %}} tags and renders the same with and "
            f"without a generation prompt, so it does not show where an answer starts; {remedy()}"
        )
    encoded = template.encode(turns)
    if not any(encoded.supervised):
        raise DataError(f"dataset.chat_template: {template.name} supervises nothing; {remedy()}")
    _check_header(template, template.encode_prompt(turns[:-1]), encoded)
    if template.tagged:
        _check_tags(template)
    if not supervise_reasoning:
        return
    thoughtful = [*turns[:-1], replace(turns[-1], reasoning="r")]
    if template.render(thoughtful) == text:
        raise DataError(
            f"dataset.supervise_reasoning: {template.name} leaves reasoning out of the text; name a template that "
            "renders reasoning_content in dataset.chat_template, or set dataset.supervise_reasoning: false"
        )
    whole = template.encode(thoughtful, supervise_reasoning=True)
    if _behind_stop(template, whole) > _behind_stop(template, encoded):
        raise DataError(
            f"dataset.supervise_reasoning: {template.name} writes "
            f"{template.tokenizer.decode(_learned(whole)[-_behind_stop(template, whole) - 1])} behind reasoning, "
            "which also ends an answer, so a model would stop before it answers; set dataset.supervise_reasoning: "
            "false, or have the template close reasoning with another token"
        )


def check_end(template: ChatTemplate) -> None:
    """Raise DataError if no token that ends an answer is supervised in an exchange."""
    learned = _learned(template.encode(_exchange(template)))
    if set(learned).isdisjoint(template.form.stop_ids):
        eos = template.tokenizer.eos_token or "an EOS token"
        tags = ", within its {% generation %} tags" if template.tagged else ""
        markup = MARKUP.search(template.form.closing)
        spelt = markup and len(template.tokenizer.encode(markup.group(), add_special_tokens=False)) > 1
        adding = f"add {markup.group()!r} to the tokenizer, " if markup and spelt else ""
        raise DataError(
            f"dataset.chat_template: {template.name} closes an answer with {template.form.closing!r}, in which no "
            f"control token is supervised, so a model would never learn to stop; {adding}have it write {eos} "
            f"behind each answer{tags}, or set dllm.supervise_padding: true"
        )


def _learned(encoded: Encoded) -> list[int]:
    return [token for token, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised]


def _behind_stop(template: ChatTemplate, encoded: Encoded) -> int:
    """Return how many tokens of an answer stand behind its first stop token; 0 without one."""
    learned = _learned(encoded)
    first = next((place for place, token in enumerate(learned) if token in template.form.stop_ids), len(learned) - 1)
    return len(learned) - 1 - first


def _exchange(template: ChatTemplate) -> list[Message]:
    """Return a plain question and answer, with a system turn where the template insists on one."""
    words = {"system": "Answer.", "user": "a"}
    start = [Message(turn["role"], words[turn["role"]]) for turn in template.form.start or STARTS[0]]
    return [*start, Message("assistant", "b")]


def _check_header(template: ChatTemplate, prompt: list[int], encoded: Encoded) -> None:
    """Refuse an answer that starts later than the prompt ends: a model would be asked otherwise than it was trained."""
    first = encoded.supervised.index(True)
    between = encoded.ids[len(prompt) : first] if encoded.ids[: len(prompt)] == prompt else []
    text = template.tokenizer.decode(between)
    if text.strip():
        raise DataError(
            f"dataset.chat_template: {template.name} writes {text!r} in front of an answer, outside its "
            "{% generation %} tags, and not where it is asked for a prompt, so a model would be asked otherwise "
            "than it was trained; write it where add_generation_prompt is set, too"
        )


def _check_tags(template: ChatTemplate) -> None:
    """Refuse tags that take in what is asked: it would be learned as an answer."""
    text, spans = template.render_spans([*(template.form.start or STARTS[0]), {"role": "assistant", "content": PROBE}])
    answer = text.rfind(PROBE)
    if any(stop <= answer and text[start:stop].strip() for start, stop in filter(None, spans)):
        raise DataError(
            f"dataset.chat_template: {template.name} has turns before the answer inside its {{% generation %}} tags, "
            "so they would be learned as answers; tag what the assistant writes alone"
        )
