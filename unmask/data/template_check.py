"""Whether training can use a chat template: it is asked for one plain exchange, as a row would be.

What a template makes of longer conversations shows when a row has one. The functions take a `chat.ChatTemplate`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unmask.data.conversation import Message
from unmask.data.template_source import remedy
from unmask.data.turns import MARKUP, STARTS
from unmask.errors import DataError


def check_answer(template: Any, supervise_reasoning: bool = False) -> None:
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


def check_end(template: Any) -> None:
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


def _learned(encoded: Any) -> list[int]:
    return [token for token, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised]


def _behind_stop(template: Any, encoded: Any) -> int:
    """Return how many tokens of an answer stand behind its first stop token; 0 without one."""
    learned = _learned(encoded)
    first = next((place for place, token in enumerate(learned) if token in template.form.stop_ids), len(learned) - 1)
    return len(learned) - 1 - first


def _exchange(template: Any) -> list[Message]:
    """Return a plain question and answer, with a system turn where the template insists on one."""
    words = {"system": "Answer.", "user": "a"}
    start = [Message(turn["role"], words[turn["role"]]) for turn in template.form.start or STARTS[0]]
    return [*start, Message("assistant", "b")]


def _check_header(template: Any, prompt: list[int], encoded: Any) -> None:
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
