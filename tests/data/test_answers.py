"""The comparison of renderings on renderings written out, where no real template is so odd."""

from __future__ import annotations

from unmask.data.renderings import answer_turns, find_answers

USER, PLAIN = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
THOUGHT = {**PLAIN, "reasoning": "r"}


def rendered(turns, add_generation_prompt, answers) -> str:
    text = "".join("Q" if turn["role"] == "user" else ">" + answers["reasoning" in turn] for turn in turns)
    return text + ">" * add_generation_prompt


def found(with_reasoning: str, without: str, supervise_reasoning: bool = False):
    def render(turns, add_generation_prompt):
        return rendered(turns, add_generation_prompt, {True: with_reasoning, False: without})

    turns = [USER, THOUGHT]
    return find_answers(render, render(turns, False), turns, supervise_reasoning)


def test_the_answer_is_what_remains_without_the_reasoning():
    assert found("ra.", "a.") == [(3, 5)]
    assert found("ra.", "a.", supervise_reasoning=True) == [(2, 5)]
    assert found("a.", "a.") == [(2, 4)]


def test_an_answer_that_reasoning_changes_is_unknown():
    assert found("ra.", "-a.") == [None]
    assert found("a.", "Q>a.") == [None]  # longer without reasoning, and the same at its end
    assert found("ra.", "-a.", supervise_reasoning=True) == [(2, 5)]


def test_assistant_turns_in_a_row_are_one_answer_where_they_are_written_as_one_turn():
    def joined(turns, add_generation_prompt):
        text = rendered(turns, add_generation_prompt, {True: "ra.", False: "a."})
        return text.replace(".>", "") if not add_generation_prompt else text

    def apart(turns, add_generation_prompt):
        return rendered(turns, add_generation_prompt, {True: "ra.", False: "a."})

    turns = [PLAIN, USER, PLAIN, THOUGHT, USER]
    assert answer_turns(joined, turns) == [range(0, 1), range(2, 4)]
    assert answer_turns(apart, turns) == [range(0, 1), range(2, 3), range(3, 4)]
