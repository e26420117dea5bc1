from __future__ import annotations

import numpy as np
import pytest
import torch

from unmask.errors import SamplingError
from unmask.sampling.prompts import as_list, encode_prompts

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("hi", 1),
        (["hi"], 1),
        (["hi", "ho"], 2),
        (CHAT, 1),
        ([CHAT, CHAT], 2),
        ([1, 2, 3], 1),
        ([[1, 2], [3]], 2),
        ((1, 2), 1),
        (["hi", CHAT, [1]], 3),
        (torch.tensor([[1, 2], [3, 4]]), 2),
        (np.array([1, 2]), 1),
        ([torch.tensor([1, 2])], 1),
        ([], 0),
    ],
)
def test_one_prompt_and_many_are_told_apart(prompts, count):
    assert len(as_list(prompts)) == count


def test_ids_are_taken_as_they_are_without_a_tokenizer():
    assert encode_prompts([[1, 2], torch.tensor([3])], None) == [[1, 2], [3]]


def test_text_is_a_user_turn_and_raw_text_is_literal(chat_tokenizer):
    chat, same = encode_prompts(["hi", CHAT], chat_tokenizer)
    assert chat == same
    assert chat_tokenizer.decode(chat) == "<|start|>user\nhi<|eot_id|><|start|>assistant\n"
    assert chat_tokenizer.decode(encode_prompts("hi", chat_tokenizer, raw=True)[0]) == "hi"


def test_a_mask_spelt_in_a_chat_is_text_and_in_raw_text_the_token(chat_tokenizer):
    mask = chat_tokenizer.convert_tokens_to_ids("<|mask|>")
    chat = encode_prompts("a <|mask|>", chat_tokenizer, mask_id=mask)[0]
    assert mask not in chat and "a <|mask|>" in chat_tokenizer.decode(chat)
    assert encode_prompts("a<|mask|>", chat_tokenizer, raw=True)[0][-1] == mask


@pytest.mark.parametrize(
    ("prompts", "raw", "says"),
    [
        ("", False, "prompt 0: the text is empty"),
        (["hi", " \n"], True, "prompt 1: the text is empty"),
        ([[1], []], False, "prompt 1: the list is empty"),
        ([[{"role": "user", "content": " "}]], False, "every message is empty"),
        ([[{"role": "user"}]], False, "message 0 needs the texts 'role' and 'content'"),
        ([CHAT], True, "leave raw out"),
        (["hi", "hi \ud83d"], False, "prompt 1 holds half a surrogate pair"),
        ("hi \ud83d", True, "prompt 0 holds half a surrogate pair"),
        ([[{"role": "user", "content": "\udc80"}]], False, "prompt 0: message 0.content holds half a surrogate pair"),
        ([[1.5]], False, r"expected text, messages or token ids, got \[1.5\]"),
        ([["hi"]], False, "expected text, messages or token ids"),
        ([None], False, "got None"),
        (7, False, "prompts: expected texts.*got 7"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(chat_tokenizer, prompts, raw, says):
    with pytest.raises(SamplingError, match=says):
        encode_prompts(prompts, chat_tokenizer, raw)


def test_text_without_a_tokenizer_names_the_remedy():
    with pytest.raises(SamplingError, match="load_tokenizer"):
        encode_prompts("hi", None)


def test_a_tokenizer_without_a_template_names_raw(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", None)
    with pytest.raises(SamplingError, match="no chat template.*raw"):
        encode_prompts("hi", chat_tokenizer)
    assert len(encode_prompts("hi", chat_tokenizer, raw=True)[0]) == 2
