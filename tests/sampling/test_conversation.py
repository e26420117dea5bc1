"""A conversation's turns, its commands and what of it fits, without a model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.config.sampler import SamplerConfig
from unmask.data.files import FileRows
from unmask.data.formats import Columns
from unmask.errors import SamplingError
from unmask.models.diffusion_gemma.family import FAMILY as DIFFUSION_GEMMA
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.chat import COMMANDS, Conversation, as_turn, is_command, run_command
from unmask.sampling.settings import resolve_settings


class Config:
    max_sequence_length = 4096
    canvas_length = 256


def opened(family=LLADA, **fields) -> Conversation:
    return Conversation(lambda sampler: resolve_settings(sampler, family, Config, {}), **fields)


def talked(exchanges: int, system: bool = False) -> Conversation:
    conversation = opened().say("system", "s") if system else opened()
    for number in range(exchanges):
        conversation = conversation.say("user", f"question {number}").say("assistant", f"answer {number}")
    return conversation


def count(turns) -> int:
    return sum(len(turn["content"].split()) for turn in turns)


@pytest.mark.parametrize("system", [False, True])
def test_the_oldest_exchanges_are_left_out_when_the_context_is_full(system):
    asked = talked(3, system).say("user", "and now this")
    fitted = asked.fit(count, 11)
    assert [turn["content"] for turn in fitted.seen] == ["s"] * system + [
        "question 1", "answer 1", "question 2", "answer 2", "and now this",
    ][0 if not system else 2 :]  # fmt: skip
    assert fitted.turns == asked.turns  # what is saved is the whole conversation
    assert fitted.say("assistant", "a").say("user", "b").fit(count, 11).forgotten >= fitted.forgotten


@given(st.integers(0, 6), st.booleans(), st.integers(3, 40))
def test_what_fits_is_the_longest_tail_that_does(exchanges, system, room):
    asked = talked(exchanges, system).say("user", "c")
    fitted = asked.fit(count, room)
    assert count(fitted.seen) <= room and fitted.seen[-1]["content"] == "c"
    assert fitted.seen[: len(fitted.system)] == asked.system
    if fitted.forgotten:
        more = asked.system + asked.turns[len(asked.system) + fitted.forgotten - 2 :]
        assert count(more) > room


def test_a_turn_that_does_not_fit_alone_is_refused():
    with pytest.raises(SamplingError, match="this turn: 4 tokens.*room for 3.*--max_new_tokens"):
        talked(2).say("user", "one two three four").fit(count, 3)


def test_lines_are_turns_or_commands():
    assert is_command("/help") and not is_command("//help") and not is_command("what is 1/2?")
    assert as_turn("//help") == "/help" and as_turn(" /x") == " /x"


def test_commands_change_the_conversation():
    conversation = talked(2, system=True)
    assert run_command(conversation, "/reset").conversation.turns == conversation.system
    changed = run_command(run_command(conversation, "/steps 7").conversation, "/seed 9").conversation
    assert (changed.sampler.steps, changed.seed, changed.turns) == (7, 9, conversation.turns)
    assert run_command(conversation, "/quit").leave
    text = run_command(conversation, "/help").note
    assert all(command.usage in text for command in COMMANDS.values())


@pytest.mark.parametrize(
    ("sampler", "family", "note"),
    [
        ({}, LLADA, "steps: 7 an answer"),
        ({"threshold": 0.9}, LLADA, "steps: 7; not used while --threshold is set"),
        ({"factor": 1.0}, LLADA, "steps: 7; not used while --factor is set"),
        ({"entropy_bound": 0.2}, LLADA, "steps: 7; not used while --entropy_bound is set"),
        ({"preset": "fast"}, LLADA, "steps: 7 an answer, in place of the preset's threshold 0.9"),
        ({"preset": "fast"}, DIFFUSION_GEMMA, "steps: 7 a canvas at the most"),
    ],
)
def test_a_number_of_steps_says_what_it_changes(sampler, family, note):
    asked = opened(family, sampler=SamplerConfig(**sampler))
    outcome = run_command(asked, "/steps 7")
    assert (outcome.note, outcome.conversation.settings.steps) == (note, 7)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/stps 4", ["'/stps'", "did you mean '/steps'", "/help"]),
        ("/steps", ["/steps", "at least 1"]),
        ("/steps ٣", ["/steps", "whole number", "'٣'"]),
        ("/steps 0", ["/steps", "at least 1", "'0'"]),
        ("/seed x", ["/seed", "whole number", "'x'"]),
        ("/save", ["/save FILE.jsonl"]),
        ("/save notes.txt", ["notes.txt", ".jsonl"]),
        ("/save nowhere/a.jsonl", ["nowhere/a.jsonl", "No such file"]),
        ("/save ~nosuchuser/a.jsonl", ["~nosuchuser/a.jsonl", "no user"]),
        ("/reset now", ["/reset", "'now'"]),
    ],
)
def test_mistakes_in_commands_name_the_remedy(line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SamplingError) as refused:
        run_command(talked(1), line)
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_nothing_is_saved_before_an_answer(tmp_path):
    with pytest.raises(SamplingError, match="nothing has been answered"):
        run_command(opened().say("user", "hi"), f"/save {tmp_path / 'a.jsonl'}")


def test_saved_conversations_are_rows_that_training_reads(tmp_path):
    path = tmp_path / "a b.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "old\u2028"}]}', "utf-8")  # and no newline
    odd = opened().say("user", 'é☃\u2028"\n').say("assistant", "</script>")
    assert "row 2" in run_command(odd, f"/save {path}").note
    assert "row 3" in run_command(talked(2, system=True), f"/save {path}").note
    rows = FileRows(path, Columns(), "dataset")
    assert len(rows) == 3 and [m.content for m in rows[1].messages] == ['é☃\u2028"\n', "</script>"]
    assert [m.role for m in rows[2].messages] == ["system", *("user", "assistant") * 2]
    assert json.loads(path.read_text("utf-8").split("\n")[1])["messages"] == list(odd.turns)


def test_exchanges_without_an_answer_are_left_out_of_a_saved_row(tmp_path):
    path = tmp_path / "a.jsonl"
    conversation = opened().say("system", "s")
    for number, text in enumerate(("", "two", "\u200b\n")):
        conversation = conversation.say("user", f"question {number}").say("assistant", text, "thought")
    note = run_command(conversation, f"/save {path}").note
    assert note == f"3 turns added to {path} as row 1; 4 without an answer are left out"
    assert [turn.content for turn in FileRows(path, Columns(), "dataset")[0].messages] == ["s", "question 1", "two"]
    with pytest.raises(SamplingError, match="nothing has been answered"):
        run_command(opened().say("user", "hi").say("assistant", " "), f"/save {path}")
