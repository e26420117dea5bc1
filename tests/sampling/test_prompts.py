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
        ([[{"role": "user", "content": " "}]], False, r"messages\[0\].content is empty"),
        ([[{"role": "user"}]], False, r"messages\[0\].content must be text, got null"),
        ([CHAT], True, "leave raw out"),
        (["hi", "hi \ud83d"], False, "prompt 1 holds half a surrogate pair"),
        ("hi \ud83d", True, "prompt 0 holds half a surrogate pair"),
        (
            [[{"role": "user", "content": "\udc80"}]],
            False,
            r"prompt 0: messages\[0\].content holds half a surrogate pair",
        ),
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


PLAIN = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi ho"}]
FORMS = {
    "parts": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " ho"}]},
    ],
    "from and value": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi ho"}],
    "mixed": [{"role": "system", "content": "s"}, {"from": "human", "value": "hi ho"}],
    "a row": {"messages": PLAIN, "id": 7, "completion": "not asked"},
    "a row with an answer": {"messages": [*PLAIN, {"role": "assistant", "content": "no"}]},
    "a row whose answer is to be written": {"messages": [*PLAIN, {"role": "assistant", "content": ""}]},
    "conversations": {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi ho"}]},
    "a row's own system": {"system": "s", "messages": PLAIN[1:]},
    "a text with a system": {"system": "s", "prompt": "hi ho"},
    "a prompt of turns": {"prompt": PLAIN},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_chat_is_the_same_in_every_form_that_training_reads(chat_tokenizer, form: str):
    expected = encode_prompts([PLAIN], chat_tokenizer)
    assert encode_prompts([FORMS[form]], chat_tokenizer) == expected
    assert encode_prompts(FORMS[form], chat_tokenizer) == expected


def test_a_list_of_rows_is_a_list_of_prompts(chat_tokenizer):
    rows = [{"prompt": "hi"}, {"messages": CHAT}, {"prompt_ids": [1, 2]}]
    assert encode_prompts(rows, chat_tokenizer) == [*encode_prompts(["hi", "hi"], chat_tokenizer), [1, 2]]


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"role": "User", "content": "hi"}, r"prompt 0: messages\[0\].role is 'User'.*did you mean 'user'"),
        ({"role": "bot", "content": "hi"}, r"messages\[0\].role is 'bot', known are"),
        ({"content": "hi"}, r"messages\[0\].role is missing"),
        ({"role": "user", "content": "\u200b"}, r"messages\[0\].content is empty"),
        ({"role": "user", "content": []}, r"messages\[0\].content is empty"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "of type 'image_url'"),
        ({"role": "user", "content": "hi", "images": ["x"]}, "has 'images'"),
        ({"role": "tool", "content": "hi"}, r"prompt 0: messages\[0\] is what a tool returned, and no assistant"),
    ],
)
def test_a_turn_that_training_refuses_is_no_prompt(chat_tokenizer, monkeypatch, turn, says):
    # A template that shows three roles, as most do.
    shown = "{% for m in messages if m.role != 'tool' %}<|start|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", shown)
    with pytest.raises(SamplingError, match=says) as refused:
        encode_prompts([[turn]], chat_tokenizer)
    assert "\n" not in str(refused.value)


def test_tools_are_shown_or_refused(chat_tokenizer, monkeypatch):
    asked = [*CHAT, {"role": "assistant", "content": "add(1, 2)"}, {"role": "tool", "content": "3"}]
    with monkeypatch.context() as patched:
        source = chat_tokenizer.chat_template.replace("in messages", "in messages if m.role != 'tool'")
        patched.setattr(chat_tokenizer, "chat_template", source)
        with pytest.raises(SamplingError, match="prompt 0: .*does not show the text of turn 2, of the tool"):
            encode_prompts([asked], chat_tokenizer)
    row = {"messages": CHAT, "tools": [{"name": "add", "parameters": {}}]}
    with pytest.raises(SamplingError, match="prompt 0: .*does not show the row's tools"):
        encode_prompts([row], chat_tokenizer)
    source = "{% if tools %}{{ tools | tojson }}{% endif %}" + chat_tokenizer.chat_template
    monkeypatch.setattr(chat_tokenizer, "chat_template", source)
    (ids,) = encode_prompts([row], chat_tokenizer)
    assert '"name": "add"' in chat_tokenizer.decode(ids)
    assert encode_prompts([CHAT], chat_tokenizer)[0] == ids[-len(encode_prompts([CHAT], chat_tokenizer)[0]) :]


@pytest.mark.parametrize("prompt", [{"role": "user", "content": "hi"}, {"messages": CHAT, "prompt_ids": [1]}, {}])
def test_what_asks_nothing_or_twice_is_refused(chat_tokenizer, prompt):
    with pytest.raises(SamplingError, match="prompt 0: "):
        encode_prompts([[prompt], prompt] if not prompt else prompt, chat_tokenizer)
