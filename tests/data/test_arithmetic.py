"""The quickstart's problems: held out means held out, and every worked answer is right."""

from __future__ import annotations

import re

from unmask.quickstart import make_problems


def test_no_training_problem_shares_operands_and_operator_with_a_held_out_one() -> None:
    train, held_out = make_problems(2000, 200, seed=1)
    held = {problem.key for problem in held_out}
    assert len(train) == 2000 and len(held_out) == len(held) == 200
    assert not held & {problem.key for problem in train}
    assert {problem.key[1] for problem in held_out} == {"+", "-"}


def test_answers_are_worked_right_and_belong_to_their_questions() -> None:
    train, held_out = make_problems(500, 100, seed=2)
    for problem in [*train, *held_out]:
        a, operator, b = problem.key
        result = a + b if operator == "+" else a - b
        assert re.findall(r"\d+", problem.question) == [str(a), str(b)]
        assert problem.answer.startswith(f"{a}{operator}{b} = <<{a}{operator}{b}={result}>>{result} ")
        assert problem.answer.endswith(f"\n#### {result}")
        assert 10 <= result <= 99
        assert [message["role"] for message in problem.row()["messages"]] == ["user", "assistant"]


def test_problems_are_a_function_of_the_seed() -> None:
    assert make_problems(50, 20, seed=3) == make_problems(50, 20, seed=3)
    assert make_problems(50, 20, seed=3) != make_problems(50, 20, seed=4)
