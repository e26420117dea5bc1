"""Parses the YAML and JSON that users write into plain values; every error is a `ParseProblem` of one line.

Plain values are what JSON has: null, true and false, numbers, text, lists and mappings. A YAML date is text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import yaml

_DEEPEST = 100  # levels of lists and mappings within each other
_MOST = 100_000  # values in YAML, each counted as often as an alias repeats it
_DIGITS = 100  # of an integer
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")  # YAML's tags of plain values
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_TOO_DEEP = f"nested more than {_DEEPEST} levels deep"
_HALF_PAIR = "half a surrogate pair (\\ud800 to \\udfff), which is no character"

Members = Callable[[list[tuple[str, Any]]], Any]  # the (key, value) pairs of a JSON object → its value


class ParseProblem(ValueError):
    """Text that cannot be parsed; says what is wrong and on which line, as the end of a sentence."""


def parse_json(text: str | bytes, members: Members | None = None, strict: bool = True) -> Any:
    """Return the value of JSON text.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.
        members: called with the (key, value) pairs of each object, returns its value; its exceptions pass through.
        strict: refuse what JSON does not have: `NaN`, `Infinity`, numbers too large to be finite, half a surrogate
            pair. Readers of data pass False, and refuse these where they matter, naming the place in the row.

    Raises:
        ParseProblem: no JSON, nested too deeply, an integer of too many digits, or what `strict` refuses.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if strict else {}
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=members, parse_int=_integer, **hooks)
    except UnicodeDecodeError as error:
        raise ParseProblem(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ParseProblem(f"{error.msg} (line {error.lineno}, character {error.colno})") from None
    except RecursionError:
        raise ParseProblem(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _DEEPEST:  # fewer cannot nest so deep
        _check_depth(value)
    if strict and ("\\u" in text or not text.isascii()):  # no other text can have half a pair
        _check_characters(value)
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text; raises ParseProblem, also for a key given twice, where YAML keeps the last."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _extent(node, {})
        if size > _MOST:
            raise ParseProblem(f"more than {_MOST:,} values, aliases written out")
        if depth > _DEEPEST:
            raise ParseProblem(_TOO_DEEP)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ParseProblem(what + (f" (line {mark.line + 1})" if mark else "")) from None
    except yaml.YAMLError as error:
        raise ParseProblem(" ".join(str(error).split())) from None
    except RecursionError:
        raise ParseProblem(_TOO_DEEP) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_characters(value: Any) -> None:
    """Refuse half a surrogate pair anywhere in a value of JSON: no file and no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ParseProblem(_HALF_PAIR) from None


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ParseProblem(f"an integer of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ParseProblem(f"{text[:40]} is too large a number")
    return number


def _refuse_constant(name: str) -> None:
    raise ParseProblem(f"{name} is no number of JSON")


def _check_depth(value: Any) -> None:
    """Refuse a value of JSON that is nested too deeply."""
    level, depth = [value], 0
    while level := [item for parent in level for item in _items(parent)]:
        depth += 1
        if depth > _DEEPEST:
            raise ParseProblem(_TOO_DEEP)


def _items(value: Any) -> Any:
    """Return the values in a dict or list; none for other values."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _extent(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many values a node makes, aliases written out, and how deep it is.

    `known` has the same of the nodes seen so far by their id, None for those that this one stands in.
    """
    if id(node) in known:
        extent = known[id(node)]
        if extent is None:
            raise ParseProblem(f"an alias of a value that it stands in (line {node.start_mark.line + 1})")
        return extent
    known[id(node)] = None
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    extents = [_extent(child, known) for child in children] if isinstance(node, yaml.CollectionNode) else []
    extent = 1 + sum(size for size, _ in extents), max((depth for _, depth in extents), default=-1) + 1
    known[id(node)] = extent
    return extent


class _Loader(yaml.SafeLoader):
    """PyYAML's SafeLoader, which here makes plain values alone and refuses a key given twice."""

    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _TAGS
    }
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value; text that is none of its tag (`!!int x`, `0x_`) raises a YAML error, which has the line."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 4 * _DIGITS:  # in whatever base it is written
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            problem = f"{str(node.value)[:40]!r} cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """Return a scalar's text; two escapes of a surrogate pair, as JSON writes an emoji, are one character."""
        text = super().construct_scalar(node)
        if not isinstance(text, str) or text.isascii():
            return text
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.constructor.ConstructorError(None, None, _HALF_PAIR, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping; a key given twice is an error, where YAML keeps the last."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # merged keys may be given again, and SafeLoader itself refuses a key that is no scalar
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key {str(key)[:40]!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
