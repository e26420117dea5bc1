from __future__ import annotations

import io

import pytest
from rich.console import Console

from unmask.sampling.generate import generate
from unmask.sampling.settings import SamplerConfig
from unmask.sampling.view import Drawing, watch

SAMPLER = SamplerConfig(steps=24, max_new_tokens=24, block_size=12, eos="suppress")


def test_open_positions_are_shade_and_a_stop_token_ends_the_drawing(chat_tokenizer):
    h, i, stop = (*chat_tokenizer.encode("hi"), 259)
    drawing = Drawing(chat_tokenizer, (stop,))
    drawn = drawing.draw([h, 257, i, stop, h], [False, True, False, False, False], [True, False, False, False, False])
    assert drawn.plain == "h░i"
    assert [span.style for span in drawn.spans] == ["bold", "dim"]


def test_an_open_position_that_holds_a_stop_token_is_still_drawn(chat_tokenizer):
    assert Drawing(chat_tokenizer, (259,)).draw([259, 71], [True, False], [False, False]).plain == "░" + "h"


def test_a_character_of_several_tokens_is_drawn_whole(chat_tokenizer):
    ids = chat_tokenizer.encode("é☃")
    assert Drawing(chat_tokenizer, ()).draw(ids, [False] * 5, [False] * 5).plain == "é☃"


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_draws_and_gives_what_generate_gives(text_model, chat_tokenizer, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=400, color_system=None)
    answer = watch(text_model, "hi", chat_tokenizer, SAMPLER, console)
    expected = generate(text_model, ["hi"], tokenizer=chat_tokenizer, sampler=SAMPLER)[0]
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
    assert "░" in out.getvalue() or "_" in out.getvalue()


def test_lines_where_there_is_no_terminal_are_few_and_end_with_the_answer(text_model, chat_tokenizer):
    out = io.StringIO()
    answer = watch(text_model, "[bold]", chat_tokenizer, SAMPLER, Console(file=out, width=80))
    assert answer.text is not None
    shown = out.getvalue()
    assert "call 24: " in shown and shown.count("call ") <= 7
    assert shown.partition("call 24: ")[2].rstrip("\n").split() == answer.text.split()
