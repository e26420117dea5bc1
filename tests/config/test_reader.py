"""Sections: mappings in, frozen dataclasses out, every mistake named with its dotted path."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.config.reader import differences, read_section, to_mapping
from unmask.errors import ConfigError, FieldError, choice_problem, nearest


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise FieldError("rate", f"must not be negative, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 3
    on: bool = False
    limit: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    ids: tuple[int, ...] = ()
    words: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    level: Literal[1, 2] | None = None
    flag: Literal["auto", True] = "auto"
    source: str | dict[str, Any] | None = None
    inner: Inner = Inner()
    optional: Inner | None = None
    either: int | Literal["all"] = "all"
    anything: Any = None


def read(**values: Any) -> Outer:
    return read_section(Outer, {"name": "n", **values}, "run.outer")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"count": 5}, 5),
        ({"count": 5.0}, 5),
        ({"count": -(10**30)}, -(10**30)),
        ({"limit": 1}, 1.0),
        ({"limit": "2e-5"}, 2e-5),  # YAML 1.1 reads 2e-5 as text
        ({"limit": "-1E3"}, -1000.0),
        ({"limit": None}, None),
        ({"on": True}, True),
        ({"betas": [0.9, "5e-1"]}, (0.9, 0.5)),
        ({"betas": (1, 0)}, (1.0, 0.0)),
        ({"ids": []}, ()),
        ({"ids": [1, 2.0, 3]}, (1, 2, 3)),
        ({"words": ["a"]}, ["a"]),
        ({"words": None}, None),
        ({"extra": {"a": [1]}}, {"a": [1]}),
        ({"level": 2}, 2),
        ({"flag": True}, True),
        ({"source": "path"}, "path"),
        ({"source": {"d_model": 1}}, {"d_model": 1}),
        ({"inner": {"rate": "1e-3", "kind": "cosine"}}, Inner(1e-3, "cosine")),
        ({"inner": None}, Inner()),
        ({"inner": {}}, Inner()),
        ({"optional": None}, None),
        ({"optional": {}}, Inner()),
        ({"either": "all"}, "all"),
        ({"either": 4}, 4),
        ({"anything": [{"x": 1}]}, [{"x": 1}]),
    ],
    ids=str,
)
def test_values_that_are_understood(values: dict[str, Any], expected: object) -> None:
    (name,) = values
    got = getattr(read(**values), name)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, "run.outer.count: expected an integer, got True"),
        ({"count": 2.5}, "run.outer.count: expected an integer, got 2.5"),
        ({"count": "2"}, "run.outer.count: expected an integer, got '2'"),
        ({"count": None}, "run.outer.count: expected an integer, got None"),
        ({"count": math.inf}, "run.outer.count: expected an integer, got inf"),
        ({"limit": True}, "run.outer.limit: expected a number, got True"),
        ({"limit": "fast"}, "run.outer.limit: expected a number, got 'fast'"),
        ({"limit": [1]}, "run.outer.limit: expected a number, got [1]"),
        ({"limit": math.nan}, "run.outer.limit: expected a finite number, got nan"),
        ({"limit": "inf"}, "run.outer.limit: expected a finite number, got 'inf'"),
        ({"limit": 10**400}, "run.outer.limit: expected a number, got 1000"),
        ({"on": 1}, "run.outer.on: expected true or false, got 1"),
        ({"on": "true"}, "run.outer.on: expected true or false, got 'true'"),
        ({"on": None}, "run.outer.on: expected true or false, got None"),
        ({"name": 3}, "run.outer.name: expected text, got 3"),
        ({"name": None}, "run.outer.name: expected text, got None"),
        ({"betas": [0.9]}, "run.outer.betas: expected 2 values, got [0.9]"),
        ({"betas": 0.9}, "run.outer.betas: expected a list, got 0.9"),
        ({"betas": [0.9, "x"]}, "run.outer.betas[1]: expected a number, got 'x'"),
        ({"ids": [1, 2.5]}, "run.outer.ids[1]: expected an integer, got 2.5"),
        ({"ids": "12"}, "run.outer.ids: expected a list, got '12'"),
        ({"words": "a"}, "run.outer.words: expected a list, got 'a'"),
        ({"words": ["a", 1]}, "run.outer.words[1]: expected text, got 1"),
        ({"extra": [1]}, "run.outer.extra: expected a mapping, got [1]"),
        ({"level": True}, "run.outer.level: True is not one of 1, 2"),
        ({"level": 3}, "run.outer.level: 3 is not one of 1, 2"),
        ({"flag": 1}, "run.outer.flag: 1 is not one of auto, True"),
        ({"flag": "atuo"}, "run.outer.flag: 'atuo' is not one of auto, True (did you mean 'auto'?)"),
        ({"source": 3}, "run.outer.source: expected text or a mapping, got 3"),
        ({"either": "al"}, "run.outer.either: expected an integer or 'all', got 'al'"),
        ({"inner": 3}, "run.outer.inner: expected a section with keys, got 3"),
        ({"inner": {"rat": 1}}, "run.outer.inner.rat: unknown key (did you mean 'rate'?); run.outer.inner takes rate"),
        ({"optional": {"kind": "cosin"}}, "run.outer.optional.kind: 'cosin' is not one of linear, cosine (did you"),
        ({"inner": {"rate": -1}}, "run.outer.inner.rate: must not be negative, got -1.0"),
        ({"optional": {"rate": -1}}, "run.outer.optional.rate: must not be negative"),
        ({"cuont": 3}, "run.outer.cuont: unknown key (did you mean 'count'?); run.outer takes name, count"),
        ({"zzzzz": 3}, "run.outer.zzzzz: unknown key; run.outer takes name"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_their_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2


def test_a_required_field_and_the_top_level() -> None:
    with pytest.raises(ConfigError, match="^outer.name: required, but missing"):
        read_section(Outer, {}, "outer")
    with pytest.raises(ConfigError, match="^name: required, but missing"):
        read_section(Outer, None, "")
    with pytest.raises(ConfigError, match="^nmae: unknown key .did you mean 'name'.*the top level takes name"):
        read_section(Outer, {"nmae": "x"}, "")
    with pytest.raises(ConfigError, match="^1: unknown key"):
        read_section(Outer, {1: "x"}, "")
    with pytest.raises(ConfigError, match=r"^outer: expected a section with keys, got \['a'\]"):
        read_section(Outer, ["a"], "outer")


def test_reading_does_not_change_or_share_what_was_given() -> None:
    values: dict[str, Any] = {"name": "n", "extra": {"a": 1}, "words": ["x"]}
    section = read_section(Outer, values, "")
    section.extra["b"] = 2
    assert section.words is not None
    section.words.append("y")
    assert values == {"name": "n", "extra": {"a": 1}, "words": ["x"]}


@given(
    st.builds(
        Outer,
        name=st.text(),
        count=st.integers(),
        on=st.booleans(),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        betas=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
        ids=st.lists(st.integers(), max_size=3).map(tuple),
        words=st.none() | st.lists(st.text(), max_size=3),
        extra=st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3),
        level=st.sampled_from([None, 1, 2]),
        flag=st.sampled_from(["auto", True]),
        source=st.none() | st.text() | st.dictionaries(st.text(), st.integers(), max_size=2),
        inner=st.builds(Inner, st.floats(0, 1e9), st.sampled_from(["linear", "cosine"])),
        optional=st.none() | st.builds(Inner, st.floats(0, 1)),
        either=st.just("all") | st.integers(),
        anything=st.none(),
    )
)
def test_round_trip(section: Outer) -> None:
    import json

    plain = to_mapping(section)
    assert read_section(Outer, plain, "x") == section
    assert read_section(Outer, json.loads(json.dumps(plain)), "x") == section


def test_nearest_and_choices() -> None:
    assert nearest("mdml", ["mdlm", "block"]) == " (did you mean 'mdlm'?)"
    assert nearest("zzz", ["mdlm"]) == "" == nearest("x", [])
    assert choice_problem("a", ["b", "ab"]) == "'a' is not one of b, ab (did you mean 'ab'?)"
    assert choice_problem(None, [1]) == "None is not one of 1"


def test_differences_are_named_by_path() -> None:
    before = {"a": {"eps": 0.001, "on": True, "same": [1]}, "seed": 1, "v": None, "gone": "x"}
    now = {"a": {"eps": 0.1, "on": False, "same": [1], "new": "y" * 90}, "seed": 1, "v": {"k": 1}}
    assert differences(before, now) == [
        "a.eps 0.001 → 0.1",
        "a.on true → false",
        f"a.new null → {'y' * 57}...",
        'v null → {"k": 1}',
        "gone x → null",
    ]
    assert differences(before, before) == []
