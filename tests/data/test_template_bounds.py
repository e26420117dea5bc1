"""A checkpoint's chat template is a stranger's program: it reaches nothing, and ends."""

from __future__ import annotations

import re
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from unmask.data import template_bounds
from unmask.data.chat import ChatTemplate
from unmask.data.renderings import control_pattern
from unmask.errors import DataError

TURNS = [{"role": "user", "content": "hello"}]


class Words:
    special_tokens_map: dict = {}


def render(source: str) -> str:
    return ChatTemplate(Words(), source, "the template", False, control_pattern({"<x>"})).render(TURNS)


def refusal(source: str) -> str:
    with pytest.raises(DataError) as caught:
        render(source)
    said = str(caught.value)
    assert said.startswith("dataset.chat_template: the template refuses the conversation: ") and "\n" not in said
    assert len(said) < 400
    return said


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ ''|attr('format')|attr('__globals__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('{0.__class__}'|attr('format'))('').x.y }}",
        "{{ ['{0.__class__.__mro__}']|map('format', '')|list|first|attr('x') }}{{ none.x.y }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_no_template_leaves_the_sandbox(source: str) -> None:
    try:
        text = render(source)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert not any(word in text for word in ("class", "root:", "uid=", "module", "built-in", "0x"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ 1.5 ** 9999 }}",
        "{{ range(10 ** 30) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ (10 ** 5000) | string }}",
        "{{ messages[0].content.encode('ascii').decode('x') }}",
    ],
)
def test_an_error_of_a_template_is_one_line(source: str) -> None:
    refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 11 }}",
        "{{ ([1] * 10 ** 11) | length }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a' | center(10 ** 11) }}",
        "{{ 'a'.ljust(10 ** 11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ 1.5 | round(10 ** 9) }}",
        "{% set s = 'a' * 10 ** 6 %}{% for i in range(10 ** 5) %}{{ s }}{% endfor %}",
        "{% for i in range(10 ** 5) %}{{ 'a' * 10 ** 6 }}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
        "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}" + "text " * 50 + "{% endfor %}{% endfor %}",
        "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
        "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
        "{{ (['a' * 10 ** 6] * 10 ** 5) | join }}",
        "{{ ('b' * 10 ** 6).join('a' * 10 ** 6) }}",
        "{{ ('b' * 10 ** 6).join(range(10 ** 5) | map('string')) }}",
        "{{ range(10 ** 5) | join('b' * 10 ** 6) }}",
        "{{ ('\\n' * 10 ** 6) | indent(10 ** 6) }}",
        "{{ ('\\t' * 10 ** 6).expandtabs(10 ** 6) }}",
        "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
        "{{ ('{0}' * 10 ** 6).format('b' * 10 ** 6) }}",
        "{{ '{:{}}'.format('b', 10 ** 6) * 99 }}",
        "{{ '{:99999999999}'.format('b') }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ ('%s' * 10 ** 3) | format(*(['b' * 10 ** 6] * 10 ** 3)) }}",
        "{{ ([1] * 10 ** 5) | tojson(indent=10 ** 6) }}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = {1: n.s, 2: n.s} %}{% endfor %}",
        "{% set n = namespace(s=1) %}{% for i in range(99) %}{% set n.s = namespace(a=n.s, b=n.s) %}{% endfor %}",
        "{% macro f(x) %}{{ f([x, x]) }}{% endmacro %}{{ f(1) }}",
        "{% with x = [1, 2] %}" + "{% with x = [x, x] %}" * 40 + "{{ x }}" + "{% endwith %}" * 41,
        "{% for x in [[1, 2]] %}" + "{% for x in [[x, x, x, x, x, x]] %}" * 15 + "{{ x }}" + "{% endfor %}" * 16,
    ],
)
def test_what_would_fill_the_memory_is_refused(source: str) -> None:
    began = time.monotonic()
    assert re.search(
        "it (makes|writes) more than|it computes an integer of|it calls with a number over", refusal(source)
    )
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}{% endfor %}{% endfor %}",
        "{% set r = range(10 ** 5) %}{% for i in r %}{% for j in r if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% for i in range(10 ** 5) %}{{ range(10 ** 5) | sum }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(template_bounds, "_SECONDS", 0.2)
    began = time.monotonic()
    assert "it takes more than 0.2 seconds" in refusal(source)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "source",
    ["{{ ('a' * 10 ** 6) | wordwrap(1) }}", "{{ ('<' * 10 ** 6) | striptags }}", "{{ ('@' * 10 ** 6) | urlize }}",
     "{{ lipsum(10 ** 6) }}"],
)  # fmt: skip
def test_a_step_that_is_slow_by_itself_is_refused(source: str) -> None:
    began = time.monotonic()
    assert "it calls" in (said := refusal(source)) or "undefined" in said
    assert time.monotonic() - began < 5


def test_a_template_that_transformers_compiled_before_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "_SIZE", 1000)
    source = "{{ 'a' * 2000 }}{# compiled #}"
    assert len(render_jinja_template([TURNS], chat_template=source)[0][0]) == 2000
    assert "it makes more than" in refusal(source)
    assert len(render_jinja_template([TURNS], chat_template=source)[0][0]) == 2000


def test_what_templates_commonly_do_is_not_refused() -> None:
    assert render("{{ '%s of %d' % ('a', 10 ** 9) }}") == "a of 1000000000"
    assert render("{{ '{} of {:,}'.format('a', 1000000) }}") == "a of 1,000,000"
    assert render("{{ messages | map(attribute='content') | join(', ') | upper | indent(2) }}") == "HELLO"
    assert render("{{ messages | tojson(indent=4) | length }}{{ 2000000000 | string }}") == "662000000000"
    assert render("{{ (('a' * 10 ** 6).replace('a', 'b') | trim).split('c') | first | length }}") == "1000000"


def test_bounds_do_not_count_from_one_rendering_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "_SIZE", 1000)
    source = "{% for m in messages %}{{ m.content * 100 }}{% endfor %}{# sized #}"
    assert [len(render(source)) for _ in range(5)] == [500] * 5
