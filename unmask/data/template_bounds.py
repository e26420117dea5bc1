"""Renders a chat template within bounds of time and size: a checkpoint's template is a stranger's program.

transformers renders templates in Jinja's sandbox, where they reach nothing but their data. That bounds `range`, but no
loop within a loop, repeated text or power. Here the sandbox also counts: rounds of loops and calls look at the clock,
and what is written, repeated and joined is measured.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

_SECONDS = 20.0  # of one rendering, which takes milliseconds
_SIZE = 50_000_000  # characters or items that one rendering makes: many times the longest conversation
_BITS = 100_000  # of an integer
_ARGUMENT = 1_000_000  # of a filter or method, such as a width


# What the program that a template is may end with.
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError,
)  # fmt: skip


class _Rendering(threading.local):
    """The rendering that this thread is doing: when it must end, and how much it may still write."""

    deadline = float("inf")
    left = _SIZE


_rendering = _Rendering()
_swap = threading.RLock()


@contextlib.contextmanager
def bounded_rendering() -> Iterator[None]:
    """Let transformers compile and render templates within bounds; a template beyond them raises SecurityError."""
    with _swap:
        sandbox = chat_template_utils.ImmutableSandboxedEnvironment
        chat_template_utils.ImmutableSandboxedEnvironment = _BoundedEnvironment
        _rendering.deadline, _rendering.left = time.monotonic() + _SECONDS, _SIZE
        try:
            yield
        finally:
            _rendering.deadline = float("inf")
            chat_template_utils.ImmutableSandboxedEnvironment = sandbox


def _charge(size: int = 0) -> None:
    """Count what a rendering has made, and look at the clock."""
    if _rendering.deadline == float("inf"):  # transformers renders it for somebody else
        return
    _rendering.left -= size
    if _rendering.left < 0:
        raise SecurityError(f"it writes more than {_SIZE:,} characters")
    if time.monotonic() > _rendering.deadline:
        raise SecurityError(f"it takes more than {_SECONDS:g} seconds")


def _written(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    _charge(len(text))
    return text


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def from_string(self, source: Any, *args: Any, **options: Any) -> Any:
        """Compile a template with counting put into its loops and macros, its filters and what it writes."""
        self.finalize = _written
        self.filters = {name: _counted(function) for name, function in self.filters.items()}
        self.filters |= {"counted size": _round, "counted text": _kept}  # called without the sandbox's own checks
        tree = self.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_filter("counted size", nodes.Const(size))).set_lineno(node.lineno))
        for node in tree.find_all(nodes.Assign):
            node.node = _filter("counted text", node.node).set_lineno(node.lineno)
        tree.set_environment(self)
        return super().from_string(tree, *args, **options)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function, method or macro."""
        _check_arguments(args, options)
        value = super().call(context, function, *args, **options)
        _charge(len(value) if isinstance(value, str) else 0)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what could be large."""
        if operator == "+":
            value = left + right
            _charge(len(value) if isinstance(value, str | list | tuple) else 0)
            return value
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if operator == "*" and sizes and numbers:
            _charge_ahead(sizes[0] * max(numbers[0], 0))
        elif operator == "**" and len(numbers) == 2 and left.bit_length() * abs(right) > _BITS:
            raise SecurityError("it computes an integer of too many digits")
        elif operator == "*" and sum(number.bit_length() for number in numbers) > _BITS:
            raise SecurityError("it computes an integer of too many digits")
        elif operator == "%" and isinstance(left, str):
            _charge_ahead(_widths(left))
        return super().call_binop(context, operator, left, right)


def _charge_ahead(size: int) -> None:
    if size > _SIZE:
        raise SecurityError(f"it makes more than {_SIZE:,} characters or items")
    _charge(size)


def _widths(text: str) -> int:
    """Return the largest number that stands in a format."""
    return max((int(digits[:12]) for digits in "".join(c if c.isdigit() else " " for c in text).split()), default=0)


def _check_arguments(args: Any, options: Any) -> None:
    for value in (*args, *options.values()):
        if isinstance(value, int) and abs(value) > _ARGUMENT:
            raise SecurityError(f"it calls with a number over {_ARGUMENT:,}")


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with Jinja's marks of what else it takes
    def counted(*args: Any, **options: Any) -> Any:
        _check_arguments(args, options)
        value = function(*args, **options)
        _charge(len(value) if isinstance(value, str) else 0)
        return value

    return counted


# With a context, or Jinja would call them once, when it compiles.
@pass_context
def _round(_: Any, size: int) -> None:
    """Count one round of a loop, or one call of a macro, that writes so much."""
    _charge(size)


@pass_context
def _kept(_: Any, value: Any) -> Any:
    """Return a value that a template keeps, text counted."""
    if isinstance(value, str):
        _charge(len(value))
    return value


def _filter(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)
