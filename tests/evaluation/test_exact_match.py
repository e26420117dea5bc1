from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.config.sampler import SamplerConfig
from unmask.data.conversation import Message
from unmask.errors import SamplingError
from unmask.evaluation.exact_match import cut_at, divide, score_answers
from unmask.evaluation.tasks import Question
from unmask.models.loading import load_model
from unmask.models.tokenizer import load_tokenizer

SHORT = SamplerConfig(max_new_tokens=8, steps=8, block_size=8)


@pytest.fixture(scope="module")
def asked(tiny_base: Path):
    """A tiny model, its tokenizer and a few questions."""
    questions = [Question((Message("user", f"{n} plus {n}?"),), f"it is {2 * n}.", f"f:{n}") for n in range(3, 9)]
    return load_model(str(tiny_base)), load_tokenizer(str(tiny_base)), questions


def texts(scored) -> list[str]:
    return [answer.text for answer in scored.answers]


def test_what_the_model_writes_is_what_is_judged(asked) -> None:
    model, tokenizer, questions = asked
    first = score_answers(model, questions, tokenizer=tokenizer, sampler=SHORT, grader="text")
    assert [answer.row for answer in first.answers] == list(range(6))
    wanted = [replace(q, reference=text or "x") for q, text in zip(questions, texts(first), strict=True)]
    wanted[2] = replace(wanted[2], reference="something else")
    found = score_answers(model, wanted, tokenizer=tokenizer, sampler=SHORT, grader="text")
    written = [bool(text.strip()) for text in texts(first)]
    assert [answer.grade.correct for answer in found.answers] == [*written[:2], False, *written[3:]]
    assert found.right == sum(written) - written[2] and found.total == 6
    assert found.interval.low <= found.exact_match == found.right / 6 <= found.interval.high


@pytest.mark.parametrize("size", [1, 4])
def test_the_batch_size_changes_no_answer(asked, size: int) -> None:
    model, tokenizer, questions = asked
    sampler = replace(SHORT, temperature=1.0)
    whole = score_answers(model, questions, tokenizer=tokenizer, sampler=sampler)
    parts = score_answers(model, questions, tokenizer=tokenizer, sampler=sampler, batch_size=size)
    assert [answer.token_ids for answer in parts.answers] == [answer.token_ids for answer in whole.answers]


def test_a_question_that_comes_again_draws_other_numbers_however_it_is_batched(asked) -> None:
    model, tokenizer, questions = asked
    again = [questions[0]] * 3 + [questions[1]]
    sampler = replace(SHORT, temperature=1.0)
    found = texts(score_answers(model, again, tokenizer=tokenizer, sampler=sampler))
    assert len(set(found)) == 4
    assert texts(score_answers(model, again, tokenizer=tokenizer, sampler=sampler, batch_size=1)) == found


def test_an_answer_ends_at_the_first_stop_string() -> None:
    assert cut_at("one Q: two\n\nthree", ("\n\n", "Q:", "")) == "one "
    assert cut_at("one", ("Q:",)) == "one"


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=30), size=st.integers(1, 8))
def test_chunks_hold_every_row_once_and_no_prompt_twice(lengths: list[int], size: int) -> None:
    asked = [tuple(range(length)) for length in lengths]
    chunks = divide(asked, size)
    assert sorted(row for chunk in chunks for row in chunk.rows) == list(range(len(asked)))
    for chunk in chunks:
        prompts = [asked[row] for row in chunk.rows]
        assert len(set(prompts)) == len(prompts) <= size
        assert [len(prompt) for prompt in prompts] == sorted(map(len, prompts), reverse=True)
        assert all(prompt in [asked[row] for row in range(chunk.rows[0])] for prompt in prompts[:1] if chunk.repeat)


def test_a_question_that_is_too_long_shows_first_with_its_place(asked) -> None:
    model, tokenizer, questions = asked
    long = Question((Message("user", "why? " * 30),), "so", "f:99")
    with pytest.raises(SamplingError, match=r"f:99: .*over the model's max_sequence_length 96"):
        score_answers(model, [*questions, long], tokenizer=tokenizer, sampler=SHORT, batch_size=1)


def test_a_tokenizer_without_a_template_is_refused_with_the_place(asked, tiny) -> None:
    model, _, questions = asked
    bare = load_tokenizer(str(tiny.folder / "tokenizer"))
    with pytest.raises(SamplingError, match=r"f:3: .*no chat template"):
        score_answers(model, questions, tokenizer=bare, sampler=SHORT)
    literal = [Question("3 plus 3 is", "6", "f:1")]
    assert score_answers(model, literal, tokenizer=bare, sampler=SHORT).total == 1
