"""Renders a chat template within bounds of time and size: a checkpoint's template is a stranger's program.

transformers renders templates in Jinja's sandbox, where they reach nothing but their data. That bounds `range`, but no
loop within a loop, repeated text or power. Here the sandbox also counts: each round of a loop and each call looks at
the clock, text that is written, repeated or joined is counted, and operations whose result can be far larger than what
they are given (such as repeating, joining, replacing and formatting) are measured before they are done.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

_SECONDS = 20.0  # of one rendering, which takes milliseconds
_SIZE = 50_000_000  # characters that one rendering makes: many times the longest conversation
_ITEM = 64  # characters that an item of a list counts as, beside its content
_BITS = 100_000  # of the longest integer
_ARGUMENT = 1_000_000  # the largest number that a filter or method is given, such as a width
_SLOW = ("wordwrap", "urlize", "striptags", "pprint", "title", "xmlattr")  # whose time grows faster than the text
_SLOW_SIZE = 100_000  # characters that they are given
_STAR = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")  # `%*d` and `{:{}}`, whose width is one of the values

# What rendering may raise: a template is a program, and may fail in each of these ways.
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError,
)  # fmt: skip


class _Rendering(threading.local):
    """The rendering that this thread is doing: when it must end, and how much it may still write."""

    deadline = float("inf")
    left = _SIZE


_rendering = _Rendering()
_swap = threading.RLock()  # held while transformers' names are replaced, which all threads see


@contextlib.contextmanager
def bounded_rendering() -> Iterator[None]:
    """Context in which transformers renders chat templates within bounds; beyond them a template raises SecurityError.

    transformers takes no environment as an argument, so two names in its module are replaced meanwhile.
    """
    with _swap:
        compiled, sandbox = (
            chat_template_utils._compile_jinja_template,
            chat_template_utils.ImmutableSandboxedEnvironment,
        )
        chat_template_utils._compile_jinja_template = _compiled  # pyright: ignore[reportAttributeAccessIssue]
        chat_template_utils.ImmutableSandboxedEnvironment = _BoundedEnvironment
        _rendering.deadline, _rendering.left = time.monotonic() + _SECONDS, _SIZE
        try:
            yield
        finally:
            _rendering.deadline = float("inf")
            chat_template_utils._compile_jinja_template = compiled
            chat_template_utils.ImmutableSandboxedEnvironment = sandbox


@functools.lru_cache
def _compiled(source: str) -> Any:
    """Compile a template; transformers' own cache may hold one of that source that was compiled without bounds."""
    return _COMPILE(source)


_COMPILE = chat_template_utils._compile_jinja_template.__wrapped__


def _charge(size: int = 0) -> None:
    """Add to the characters that this thread's rendering has made, and look at the clock; SecurityError beyond a bound.

    Outside of `bounded_rendering`, where another caller of transformers renders such a template, nothing is counted.
    """
    if _rendering.deadline == float("inf"):
        return
    _rendering.left -= size
    if _rendering.left < 0:
        raise SecurityError(f"it writes more than {_SIZE:,} characters")
    if time.monotonic() > _rendering.deadline:
        raise SecurityError(f"it takes more than {_SECONDS:g} seconds")


def _written(value: Any) -> str:
    """Return a value as a template writes it, counted."""
    _extent(value)  # refuses a list too large before it becomes text
    text = value if isinstance(value, str) else str(value)
    _charge(len(text))
    return text


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts what a template makes and the time that it takes."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def from_string(self, source: Any, *args: Any, **options: Any) -> Any:
        """Compile a template with counting put into its loops and macros, its filters and what it writes."""
        self.finalize = _written
        self.filters = {name: _counted(name, function) for name, function in self.filters.items()}
        # As filters, which the sandbox lets pass without checks; no template can spell a name with a space.
        self.filters |= {"counted size": _count_round, "counted text": _count_kept}
        self.globals.pop("lipsum", None)  # a call of it makes as much text as it likes
        tree = self.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_filter("counted size", nodes.Const(size))).set_lineno(node.lineno))
        for node in tree.find_all(nodes.Assign):
            node.node = _filter("counted text", node.node).set_lineno(node.lineno)
        for node in tree.find_all(nodes.For):
            node.iter = _filter("counted text", node.iter).set_lineno(node.lineno)
        for node in tree.find_all(nodes.With):
            node.values = [_filter("counted text", value) for value in node.values]
        tree.set_environment(self)
        return super().from_string(tree, *args, **options)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function, method or macro, with its arguments checked and its text counted."""
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `str.format`
        subject = getattr(method, "__self__", None)
        if isinstance(subject, str):
            args = tuple(_checked(f"str.{method.__name__}", [subject, *args], options)[1:])
        else:
            _check_arguments(args, options)
        value = super().call(context, function, *args, **options)
        _charge(len(value) if isinstance(value, str) else 0)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result can be large, measured before where it can be far larger than its sides."""
        if operator == "+":
            value = left + right
            _charge(_length(value))
            return value
        sizes = [_length(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if operator == "*" and sizes and numbers:
            _charge_ahead(sizes[0] * max(numbers[0], 0))
        elif operator == "**" and len(numbers) == 2 and left.bit_length() * abs(right) > _BITS:
            raise SecurityError("it computes an integer of too many digits")
        elif operator == "*" and sum(number.bit_length() for number in numbers) > _BITS:
            raise SecurityError("it computes an integer of too many digits")
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", left, list(right) if isinstance(right, tuple) else [right])
        return super().call_binop(context, operator, left, right)


def _charge_ahead(size: int) -> None:
    """Count characters that an operation is going to make; SecurityError where they are too many."""
    if size > _SIZE:
        raise SecurityError(f"it makes more than {_SIZE:,} characters")
    _charge(size)


def _largest_number(text: str) -> int:
    """Return the largest number in a format string: no width in it is larger."""
    return max((int(digits[:12]) for digits in "".join(c if c.isdigit() else " " for c in text).split()), default=0)


def _check_arguments(args: Any, options: Any) -> None:
    """Refuse arguments of a call that are too large."""
    for value in (*args, *options.values()):
        if isinstance(value, int) and abs(value) > _ARGUMENT:
            raise SecurityError(f"it calls with a number over {_ARGUMENT:,}")
        _extent(value)


def _checked(name: str, values: Any, options: Any) -> list[Any]:
    """Return the subject and the arguments of a filter or of a method of str, after a check of what it would make.

    An iterator given to `join` becomes a list, so that its items can be counted and still be joined.
    """
    if name in ("join", "str.join"):
        values = [list(value) if isinstance(value, Iterator) else value for value in values]
    _check_arguments(values[1:], options)
    _check_growth(name, values[0], [*values[1:], *options.values()])
    return values


def _check_growth(name: str, subject: Any, values: list[Any]) -> None:
    """Refuse a filter or a method of str that would make too much of its subject, or take too long over it."""
    size = _extent(subject)
    if name in _SLOW and size > _SLOW_SIZE:
        raise SecurityError(f"it calls {name} with more than {_SLOW_SIZE:,} characters")
    text = subject if isinstance(subject, str) else ""
    largest = max((value if isinstance(value, int) else _extent(value) for value in values), default=0)
    name, is_method = name.removeprefix("str."), name.startswith("str.")
    if name == "replace" and len(values) > 1:
        _charge_ahead(str(subject).count(str(values[0])) * len(str(values[1])))
    elif name == "join":
        rows, between = (values[0], size) if is_method and values else (subject, largest)
        _charge_ahead(_extent(rows) + between * (len(rows) if isinstance(rows, Sized) else 0))
    elif name in ("format", "format_map"):
        sizes = [_extent(value) for value in values if not isinstance(value, int)]
        width = max(_largest_number(text), largest if _STAR.search(text) else 0)
        _charge_ahead((text.count("%") + text.count("{")) * max(sizes, default=0) + width)
    elif name in ("indent", "expandtabs", "translate", "tojson"):
        _charge_ahead({"indent": text.count("\n"), "expandtabs": text.count("\t")}.get(name, size) * max(largest, 1))


def _length(value: Any) -> int:
    """Return the size of a text, or of a list or mapping without the content of its items; 0 of other values."""
    return len(value) if isinstance(value, str) else _ITEM * len(value) if isinstance(value, list | tuple | dict) else 0


def _extent(value: Any, known: dict[int, int] | None = None) -> int:
    """Return about how many characters a value has when written, what is in it twice counted twice.

    `known` has the sizes of the values seen so far by their id. Raises SecurityError where it is too large.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if not isinstance(value, list | tuple | dict):
        return 1
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = 0  # where it holds itself
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        size = _length(value)
        if size <= _SIZE:
            size += sum(_extent(part, known) for part in parts)
        if size > _SIZE:
            raise SecurityError(f"it makes more than {_SIZE:,} characters")
        known[id(value)] = size
    return known[id(value)]


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that does what one of Jinja's does, its arguments checked and its text counted."""

    @functools.wraps(function)  # copies the marks by which Jinja passes some filters its context first
    def counted(*args: Any, **options: Any) -> Any:
        passed = 1 if isinstance(args[0], Context | EvalContext | Environment) else 0
        value = function(*args[:passed], *_checked(name, args[passed:], options), **options)
        _charge(len(value) if isinstance(value, str) else 0)
        return value

    return counted


# These two take a context since Jinja computes other filters of constants once, when it compiles.
@pass_context
def _count_round(_: Any, size: int) -> None:
    """Count one round of a loop, or one call of a macro, that writes `size` characters of the template's own text."""
    _charge(size)


@pass_context
def _count_kept(_: Any, value: Any) -> Any:
    """Return a value that a template assigns or loops over, its text counted."""
    _extent(value)
    if isinstance(value, str):
        _charge(len(value))
    return value


def _filter(name: str, value: Any) -> nodes.Filter:
    """Return the syntax tree of `value | name`."""
    return nodes.Filter(value, name, [], [], None, None)
