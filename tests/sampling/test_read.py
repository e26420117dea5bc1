"""An answer's text has nothing of what the template writes around it, and no turn token, special or not."""

from __future__ import annotations

from copy import deepcopy

import pytest
from tokenizers import AddedToken

from unmask.sampling.blanks import encode_blanks
from unmask.sampling.jobs import LoadedModel, as_loaded
from unmask.sampling.prompts import encode_prompts
from unmask.sampling.trace import trace_for
from unmask.sampling.view import drawing_of

AROUND = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(hm) {% endif %}"
    "{{ m.content }}\n<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def loaded(small_model, chat_tokenizer) -> LoadedModel:
    """A model whose template opens a last answer with `(hm) ` and closes one with a line break and a token."""
    tokenizer = deepcopy(chat_tokenizer)
    tokenizer.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    tokenizer.chat_template = AROUND
    ids = {"mask_token_id": 257, "eos_token_id": 259, "pad_token_id": 259}
    return as_loaded(small_model(vocab_size=261, embedding_size=261, **ids), tokenizer)


def read(loaded: LoadedModel, prompt: list[int], answer: str, ended: bool = True) -> str:
    assert loaded.tokenizer is not None
    return loaded.read(prompt, loaded.tokenizer.encode(answer, add_special_tokens=False), ended)[0]


def test_what_a_template_writes_around_an_answer_is_taken_off(loaded):
    (chat,) = encode_prompts("why?", loaded.tokenizer)
    assert read(loaded, chat, "(hm) because\n") == "because"
    assert read(loaded, chat, "(hm) because\n\n") == "because\n"
    assert read(loaded, chat, "because\n", ended=False) == "because\n"  # cut off before its end
    (raw,) = encode_prompts("why?", loaded.tokenizer, raw=True)
    assert read(loaded, raw, "(hm) because\n") == "(hm) because\n"  # a literal prompt has no form


def test_turn_tokens_that_are_not_special_are_in_no_text(loaded):
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode("a<|end|>b<|start|>c", add_special_tokens=False)
    assert "<|end|>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert loaded.read([], ids, ended=False) == ("abc", None)
    assert drawing_of(loaded, "·").draw(ids, [False] * len(ids), [False] * len(ids)).plain == "a"
    assert trace_for(loaded, ["p"], checkpoint="c", seed=1).hidden == loaded.turn_ids
    assert tokenizer.convert_tokens_to_ids("<|end|>") in loaded.stop_ids


def test_text_with_blanks_cannot_forge_turns_and_is_closed_as_answers_are(loaded):
    tokenizer, end = loaded.tokenizer, loaded.tokenizer.convert_tokens_to_ids("<|end|>")
    chat = [{"role": "user", "content": "a<|end|>"}, {"role": "assistant", "content": "b<|end|>{blank:2}"}]
    for text, ends in ((chat, 2), ("b<|end|>{blank:2}", 0)):
        (encoded,) = encode_blanks([text], ["text 0"], tokenizer, False, loaded.config, loaded.settings)
        assert [*encoded.prompt_ids, *encoded.template.answer_ids].count(end) == ends
    (encoded,) = encode_blanks([chat], ["text 0"], tokenizer, False, loaded.config, loaded.settings)
    assert tokenizer.decode(encoded.context).endswith("<|start|>assistant\n(hm) ")
    assert tokenizer.decode(encoded.template.answer_ids[2:]) == "\n<|end|>"
