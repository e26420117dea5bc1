"""Reasoning apart from the answer, in results, in the terminal and in a conversation."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from unmask.config.sampler import SamplerConfig
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.answers import record_of
from unmask.sampling.chat import Conversation, save
from unmask.sampling.generate import generate
from unmask.sampling.settings import family_settings
from unmask.sampling.text import TAGS, in_reasoning, reasoning_tags, split_reasoning, unanswered_note
from unmask.sampling.view import Drawing


@pytest.fixture(scope="module")
def thinker(chat_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with DiffusionGemma's reasoning tags, 260 and 261."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    assert reasoning_tags(tokenizer) == (260, 261)
    return tokenizer


def without_thought(text: str) -> str:
    """What the released chat template leaves of a turn (macro `strip_thinking`), untrimmed."""
    return "".join(part.split(TAGS[0])[0] for part in text.split(TAGS[1]))


@pytest.mark.parametrize(
    ("answer", "text", "reasoning"),
    [
        ("<|channel>thought\nTwo and two.\n<channel|>4", "4", "Two and two."),
        ("<|channel>thought\n<channel|>4", "4", ""),
        ("<|channel>thought<channel|>4", "4", ""),
        ("<|channel>thoughts differ<channel|>4", "4", "thoughts differ"),
        ("<|channel>thought\nand then it was too lo", "", "and then it was too lo"),
        ("4", "4", None),
        ("a<channel|>b", "ab", ""),
        ("a<|channel>thought\nx<channel|>b", "ab", "x"),
        ("", "", None),
        ("<|channel>", "", ""),
    ],
)
def test_what_is_between_the_tags_is_no_text(thinker, answer: str, text: str, reasoning: str | None) -> None:
    assert split_reasoning(thinker.encode(answer), thinker) == (text, reasoning)


def test_a_vocabulary_without_tags_has_no_reasoning(chat_tokenizer) -> None:
    spelt = "<|channel>thought\nx<channel|>b"
    assert split_reasoning(chat_tokenizer.encode(spelt), chat_tokenizer) == (spelt, None)


def test_an_unknown_tag_is_no_tag(chat_tokenizer) -> None:
    """A vocabulary with an unknown token answers with it for whatever it lacks."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.unk_token = "<|start|>"
    assert isinstance(tokenizer.convert_tokens_to_ids(TAGS[0]), int)
    assert reasoning_tags(tokenizer) is None


def test_tags_that_are_ordinary_tokens_are_no_reasoning_either(chat_tokenizer) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_tokens(list(TAGS))
    ids = tokenizer.encode("<|channel>thought\nTwo.<channel|>4")
    assert "<|channel>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert split_reasoning(ids, tokenizer) == ("4", "Two.")


@given(pieces=st.lists(st.sampled_from([*TAGS, "a", "b\n", "thought\n"]), max_size=12))
def test_the_text_is_what_the_template_would_leave(thinker, pieces: list[str]) -> None:
    answer = "".join(pieces)
    assert split_reasoning(thinker.encode(answer), thinker)[0] == without_thought(answer)


def test_results_and_records_have_it_apart(thinker, small_model) -> None:
    ids = {"mask_token_id": 257, "eos_token_id": 259, "pad_token_id": 259}
    model = small_model({260: 50.0}, vocab_size=262, embedding_size=262, **ids)
    sampler = SamplerConfig(steps=1, max_new_tokens=4)
    (answer,) = generate(model, ["hi"], tokenizer=thinker, sampler=sampler)
    assert (answer.token_ids, answer.text, answer.reasoning) == ([260] * 4, "", "")
    record = record_of("hi", answer, {}, 42)
    assert list(record)[:4] == ["prompt", "text", "token_ids", "reasoning"]
    assert record["reasoning"] == ""
    (bare,) = generate(model, [[1, 2]], sampler=sampler)
    assert (bare.text, bare.reasoning) == (None, None)


def test_a_conversation_keeps_it_for_training_and_hides_it_from_the_model(tmp_path) -> None:
    talk = (
        Conversation(lambda sampler: family_settings(LLADA))
        .say("user", "2+2?")
        .say("assistant", "4", "Two and two.")
        .say("user", "and 3+3?")
    )
    assert [sorted(turn) for turn in talk.seen] == [["content", "role"]] * 3
    talk = talk.say("assistant", "6", "")
    save(talk, tmp_path / "talk.jsonl")
    turns = json.loads((tmp_path / "talk.jsonl").read_text("utf-8"))["messages"]
    assert turns[1] == {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
    assert turns[3] == {"role": "assistant", "content": "6"}


def test_it_is_drawn_in_italics_once_it_is_settled(thinker) -> None:
    ids = thinker.encode("<|channel>ab<channel|>c")
    drawn = Drawing(thinker, ()).draw(ids, [False] * 5, [False] * 5)
    assert drawn.plain == "abc"
    assert [(span.start, span.end, span.style) for span in drawn.spans if span.style] == [(0, 2, "italic")]
    # A noisy token of a canvas that happens to be a tag begins nothing.
    noisy = Drawing(thinker, (), None).draw(ids, [True, False, False, False, False], [False] * 5)
    assert noisy.plain == "abc"
    assert not any(span.style == "italic" for span in noisy.spans)


def test_reasoning_that_leaves_no_room_is_pointed_out() -> None:
    assert "raise --max_new_tokens" in (unanswered_note("", "so it went on") or "")
    assert [unanswered_note(*pair) for pair in (("4", "hm"), ("", ""), ("", None), (None, None))] == [None] * 4


def test_every_token_is_inside_or_outside() -> None:
    assert in_reasoning([7, 1, 8, 2, 9, 2, 1, 5], (1, 2)) == [False, True, True, True, False, True, True, True]
    assert in_reasoning([7, 1], None) == [False, False]
