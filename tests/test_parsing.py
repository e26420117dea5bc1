"""YAML and JSON of any kind give plain values or one ParseProblem, which says where it can what is wrong."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from unmask.parsing import ParseProblem, parse_json, parse_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int x", "'x' cannot be read as int (line 1)"),
        ("a: 1\nb: 0x_", "'0x_' cannot be read as int (line 2)"),
        ("a: !!bool maybe", "cannot be read as bool"),
        ("a: !!float x", "cannot be read as float"),
        ("a: !!int ''", "cannot be read as int"),
        ("a: " + "9" * 5000, "cannot be read as int"),
        ("a: 0x" + "f" * 5000, "cannot be read as int"),
        ("a: " + "[" * 5000, "nested"),
        ("a: " + "[" * 150 + "]" * 150, "nested"),
        (BOMB, "100,000 values"),
        (MERGES, "100,000 values"),
        ("a: &a [*a]", "alias of a value that it stands in"),
        ("a: 1\na: 2", "key 'a' is given twice (line 2)"),
        ("a: !!timestamp 2024-02-30", "could not determine a constructor"),
        ("a: !!binary '%'", "could not determine a constructor"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ('a: "\\ud83d"', "half a surrogate pair"),
        ("a: [", "line"),
        ("a: 1\n--- \nb: 2", "single document"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_yaml_that_has_no_value_is_one_problem(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(ParseProblem) as caught:
        parse_yaml(text)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested"),
        ("[" * 300 + "]" * 300, "nested"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested"),
        ("9" * 5000, "an integer of 5,000 digits"),
        ("NaN", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "too large"),
        ('"\\ud83d"', "half a surrogate pair"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ('{"a": 1,\n"b"}', "(line 2, character 4)"),
        ("", "Expecting value"),
        (b"\xff", "byte 0 is not UTF-8"),
    ],
)
def test_json_that_has_no_value_is_one_problem(text: str | bytes, words: str) -> None:
    with pytest.raises(ParseProblem) as caught:
        parse_json(text)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_dates_are_text_and_escaped_pairs_are_characters() -> None:
    assert parse_yaml("a: 2024-02-30\nb: 2024-01-01T10:00:00Z") == {"a": "2024-02-30", "b": "2024-01-01T10:00:00Z"}
    values = {"note": "😀 é", "😀": [1, -2.5, None, True, {"x": []}]}
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False)):
        assert parse_yaml(text) == parse_json(text) == parse_json(text.encode()) == values


def test_aliases_and_merges_of_common_size_are_read() -> None:
    text = "base: &base {lr: 1.0e-3, betas: [0.9, 0.95]}\nrun:\n  <<: *base\n  lr: 2.0e-3\nother: *base\n"
    values = parse_yaml(text)
    assert values["run"] == {"lr": 2e-3, "betas": [0.9, 0.95]} and values["other"] == values["base"]
    assert parse_yaml("") is None and parse_json("[" * 90 + "]" * 90)


def test_no_other_module_parses_files() -> None:
    package = Path(__file__).parents[1] / "unmask"
    parsing = re.compile(r"json\.loads?\((?!json\.dumps|key\))|yaml\.(?!safe_dump)\w*load|JSONDecoder\(")
    found = {path.name for path in package.rglob("*.py") if parsing.search(path.read_text("utf-8"))}
    # Rows by the million have a parser of their own; the quickstart's YAML lies in the package.
    assert found == {"parsing.py", "files.py", "quickstart.py"}
