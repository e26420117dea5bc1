"""The tokenizer for models made from scratch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import ModelError
from unmask.models.family import ControlTokens
from unmask.models.registry import FAMILIES, resolve
from unmask.models.tokenizer import train_tokenizer


def controls_of(model_type: str) -> ControlTokens:
    found = resolve(FAMILIES[model_type]).control_tokens
    assert found is not None
    return found


LLADA, DIFFUSION_GEMMA = controls_of("llada"), controls_of("diffusion_gemma")
TEXTS = ["Ada has 23 apples and buys 4.", "user\n\nHow many now?", "23+4 = <<23+4=27>>27 apples"] * 20
TOKENIZER = train_tokenizer(TEXTS, 300, LLADA)


def test_control_tokens_have_the_first_ids_and_their_roles() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(LLADA.tokens)) == list(range(6))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, TOKENIZER.mask_token_id) == (
        0,
        1,
        1,
        5,
    )
    assert len(TOKENIZER) <= 300


def test_digits_stay_single_tokens() -> None:
    assert [token for token in TOKENIZER.tokenize("23+4=27") if token.isdigit()] == list("23427")


@given(st.text(max_size=40))
def test_any_text_survives_the_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    if not any(token in text for token in LLADA.tokens):
        assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match="vocab_size: 100"):
        train_tokenizer(TEXTS, 100, LLADA)


def test_another_family_has_its_own_control_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, DIFFUSION_GEMMA)
    assert tokenizer.convert_tokens_to_ids(list(DIFFUSION_GEMMA.tokens)) == list(range(8))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.mask_token_id is None
