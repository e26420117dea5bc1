"""Law: the package keeps the shape that `python -m benchmarks.structure` measures."""

from __future__ import annotations

from benchmarks.structure import Measure, count, prompt_path


def missed(measures: list[Measure]) -> list[str]:
    return [
        f"{each.name}: {each.value}, at most {each.most}; {', '.join(each.where)}" for each in measures if not each.met
    ]


def test_files_imports_and_names_stay_within_their_bounds() -> None:
    assert missed(count()) == []


def test_a_prompt_goes_from_the_command_line_to_the_network_once() -> None:
    assert missed(prompt_path()) == []


def test_a_missed_bound_is_told() -> None:
    assert missed([Measure("files", 3, 2, ("a.py",)), Measure("lines", 3, 3), Measure("shown", 9)]) == [
        "files: 3, at most 2; a.py"
    ]
