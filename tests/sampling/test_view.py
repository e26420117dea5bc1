from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console

from unmask.config.sampler import SamplerConfig
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.generate import generate
from unmask.sampling.text import printable
from unmask.sampling.view import Drawing, Watcher, watch

SAMPLER = SamplerConfig(steps=24, max_new_tokens=24, block_size=12, eos="suppress")


def console(terminal: bool, **options) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    options = {"color_system": None, "width": 400, "no_color": False, "_environ": {}} | options
    return Console(file=out, force_terminal=terminal, **options), out


def event(row: int, answer: list[int], open_: list[bool], sure: list[float], finished: bool = False) -> StepEvent:
    """An event of one row; `sure` is nan where nothing was weighed."""
    one, nothing = torch.tensor([1]), torch.zeros(1, len(answer), dtype=torch.bool)
    sure_1C = torch.tensor([sure])
    return StepEvent(
        rows=(row,),
        lengths=(len(answer),),
        block_B=one - 1,
        end_B=torch.tensor([len(answer)]),
        step_B=one - 1,
        nfe_B=one,
        answer_BC=torch.tensor([answer]),
        masked_BC=torch.tensor([open_]),
        committed_BC=nothing,
        revised_BC=nothing,
        score_BC=sure_1C.nan_to_num(nan=-math.inf),
        confidence_BC=sure_1C.nan_to_num(),
        finished_B=torch.tensor([finished]),
    )


def test_open_positions_are_shade_and_a_stop_token_ends_the_drawing(chat_tokenizer):
    h, i, stop = (*chat_tokenizer.encode("hi"), 259)
    drawing = Drawing(chat_tokenizer, (stop,))
    drawn = drawing.draw([h, 257, i, stop, h], [False, True, False, False, False], [True, False, False, False, False])
    assert drawn.plain == "h·i"
    assert [span.style for span in drawn.spans] == ["bold", "dim"]


def test_the_shade_rises_with_the_confidence(chat_tokenizer):
    confidence = [math.nan, 0.0, 0.3, 0.34, 0.7, 1.0]
    assert Drawing(chat_tokenizer, ()).draw([257] * 6, [True] * 6, [False] * 6, confidence).plain == "·░░▒▓▓"


def test_an_open_position_that_holds_a_stop_token_is_still_drawn(chat_tokenizer):
    assert Drawing(chat_tokenizer, (259,)).draw([259, 71], [True, False], [False, False]).plain == "·" + "h"


def test_a_given_stop_token_ends_nothing(chat_tokenizer):
    where, out = console(True)
    ids = [71, 259, 257, 258, 72]
    with Watcher(Drawing(chat_tokenizer, (258, 259)), where) as watcher:
        watcher(event(0, ids, [False, False, True, True, True], [math.nan] * 5))
        watcher(event(0, [71, 259, 72, 258, 72], [False] * 5, [math.nan] * 5, finished=True))
    assert "h···" in out.getvalue() and "hi\n" in out.getvalue()


def test_a_character_of_several_tokens_is_drawn_whole(chat_tokenizer):
    ids = chat_tokenizer.encode("é☃")
    assert Drawing(chat_tokenizer, ()).draw(ids, [False] * 5, [False] * 5).plain == "é☃"


def test_a_model_cannot_steer_the_terminal(chat_tokenizer):
    assert printable("a\x1b]0;title\x07b\x9b2J\r\n\tc") == "a\ufffd]0;title\ufffdb\ufffd2J\ufffd\n\tc"
    ids = chat_tokenizer.encode("\x1b[2J")
    assert "\x1b" not in Drawing(chat_tokenizer, ()).draw(ids, [False] * 4, [False] * 4).plain


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_draws_and_gives_what_generate_gives(text_model, chat_tokenizer, terminal):
    where, out = console(terminal)
    (answer,) = watch(text_model, "hi", chat_tokenizer, SAMPLER, where)
    expected = generate(text_model, ["hi"], tokenizer=chat_tokenizer, sampler=SAMPLER)[0]
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
    assert any(shade in out.getvalue() for shade in "░▒▓")
    assert ("\x1b" in out.getvalue()) == terminal


def test_several_prompts_come_one_after_the_other_under_their_titles(text_model, chat_tokenizer):
    prompts, heard = ["a longer one", "hi", "hi"], []
    where, out = console(False)
    answers = watch(text_model, prompts, chat_tokenizer, SAMPLER, where, seed=3, on_event=heard.append)
    expected = generate(text_model, prompts, tokenizer=chat_tokenizer, sampler=SAMPLER, seed=3)
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
    headings = [line for line in out.getvalue().splitlines() if line.startswith("> ")]
    assert sorted(headings) == ["> a longer one", "> hi", "> hi"]
    assert {row for one in heard for row in one.rows} == {0, 1, 2}


@pytest.mark.parametrize("how", [{}, {"no_color": True}, {"_environ": {"TERM": "dumb"}}])
def test_plain_lines_are_few_and_end_with_the_answer(text_model, chat_tokenizer, how):
    where, out = console(bool(how), width=80, **how)
    (answer,) = watch(text_model, "[bold]", chat_tokenizer, SAMPLER, where)
    assert answer.text is not None
    shown = out.getvalue()
    assert "\x1b" not in shown and "call 24: " in shown and shown.count("call ") <= 7
    assert shown.partition("call 24: ")[2].rstrip("\n").split() == printable(answer.text).split()


def test_an_answer_longer_than_the_window_shows_where_it_changes_and_is_printed_whole(chat_tokenizer):
    where, out = console(True, width=20, height=8, legacy_windows=False)
    ids = chat_tokenizer.encode("".join(f"line {n:02d}\n" for n in range(40)))
    drawing = Drawing(chat_tokenizer, ())
    with Watcher(drawing, where) as watcher:
        half = len(ids) // 2
        watcher(event(0, ids, [False] * half + [True] + [False] * (len(ids) - half - 1), [math.nan] * len(ids)))
        moving = out.getvalue()
        assert "·" in moving and "line 19" in moving and "line 05" not in moving and "line 39" not in moving
        watcher(event(0, ids, [False] * len(ids), [math.nan] * len(ids), finished=True))
    assert out.getvalue()[len(moving) :].count("line ") == 40


def test_an_interrupted_answer_stays_on_the_screen(chat_tokenizer):
    where, out = console(True)
    with pytest.raises(KeyboardInterrupt), Watcher(Drawing(chat_tokenizer, ()), where, {0: "why"}) as watcher:
        watcher(event(0, [*chat_tokenizer.encode("so"), 257], [False, False, True], [0, 0, 0.9]))
        raise KeyboardInterrupt
    assert out.getvalue().rstrip().endswith("so▓") and "> why" in out.getvalue()


def test_a_canvas_is_dim_while_it_changes_and_what_has_not_begun_is_not_drawn(chat_tokenizer):
    where, out = console(True, color_system="standard")
    ids = chat_tokenizer.encode("one two")
    with Watcher(Drawing(chat_tokenizer, (), shades=None), where) as watcher:
        noisy = event(0, ids, [False] * 3 + [True] * 4, [0.5] * 7)
        watcher(dataclasses.replace(noisy, end_B=torch.tensor([5])))
        assert "one\x1b[2m t\x1b[0m" in out.getvalue() and "w" not in out.getvalue()
        moving = out.getvalue()
        watcher(event(0, ids, [False] * 7, [0.5] * 7, finished=True))
    assert "one two" in out.getvalue() and "\x1b[2m" not in out.getvalue()[len(moving) :]
