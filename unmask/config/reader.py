"""Typed configuration sections: mappings in, frozen dataclasses out, every mistake named with its dotted path.

A section is a frozen dataclass of this folder whose docstring describes its fields, for the code, `--help` and the
documents alike. It may check itself in `__post_init__` by raising `FieldError`; `read_section` turns that into a
`ConfigError` with the full path.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from unmask.errors import ConfigError, FieldError, choice_problem, nearest

T = TypeVar("T")


def read_section(section: type[T], values: object, where: str) -> T:
    """Build the frozen dataclass `section` from a mapping read from YAML.

    Args:
        section: a dataclass type; nested dataclasses, Optional, Literal, tuple, list and dict fields are understood.
        values: the mapping (None counts as an empty one).
        where: dotted path of the section, for messages; "" for the top of the file.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a missing required field or a value that the
            section itself refuses; the message names the path, the value, the valid choices and the nearest spelling.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a section with keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(section)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(section)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{_path(where, key)}: unknown key{nearest(key, fields)}; "
                f"{where or 'the top level'} takes {', '.join(fields)}"
            )
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _path(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_path(where, name)}: required, but missing")
    try:
        return section(**arguments)
    except FieldError as error:
        raise ConfigError(f"{_path(where, error.field)}: {error.problem}") from None


def described(section: type) -> dict[str, str]:
    """Return field → what it means, each in one line, as the docstring's Attributes say; empty under `python -OO`."""
    _, _, attributes = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    lines = itertools.takewhile(lambda line: not line or line.startswith(" "), attributes.splitlines())
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", textwrap.dedent("\n".join(lines)), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def to_mapping(section: Any) -> dict[str, Any]:
    """Return the plain nested dict of a section, ready for YAML or JSON; `read_section` gives the section back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(section)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Return a line `path before → now` for each field in which two nested mappings (of `to_mapping`) differ."""
    lines = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, _path(where, key))
        elif old != new:
            lines.append(f"{_path(where, key)} {_shown(old)} → {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint` asks for, or raise ConfigError naming `where`."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if not any(value == choice and type(value) is type(choice) for choice in choices):  # True is no 1
            raise ConfigError(f"{where}: {choice_problem(value, choices)}")
        return value
    if dataclasses.is_dataclass(hint):
        return read_section(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin in (tuple, list):
        return _convert_sequence(hint, origin, value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        _check_keys(value, where)
        return dict(value)
    if hint is Any:
        return value
    return _convert_scalar(hint, value, where)


def _check_keys(value: Any, where: str) -> None:
    """Refuse a key that is no text, which JSON and keyword arguments cannot have, anywhere in a value."""
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(value, Mapping) and not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r} is no text; quote it")
        if isinstance(item, (Mapping, list, tuple)):
            _check_keys(item, _path(where, key))


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None:
        if type(None) in options:
            return None
        raise ConfigError(f"{where}: needs a value, got null")
    real = [option for option in options if option is not type(None)]
    problem: ConfigError | None = None
    for option in real:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            # A mapping that was meant for the section option is best explained by that option's own error.
            if problem is None or (isinstance(value, Mapping) and dataclasses.is_dataclass(option)):
                problem = error
    assert problem is not None
    if len(real) == 1 or isinstance(value, Mapping):
        raise problem
    raise ConfigError(f"{where}: expected {' or '.join(_name(option) for option in real)}, got {value!r}")


def _convert_sequence(hint: Any, origin: type, value: Any, where: str) -> Any:
    arguments = typing.get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(value) != len(arguments):
            raise ConfigError(f"{where}: expected {len(arguments)} values, got {value!r}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
    return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    wrong = ConfigError(f"{where}: expected {_name(hint)}, got {value!r}")
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or value is None:
        raise wrong
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if not isinstance(value, int):
            raise wrong
        return value
    if hint is float:
        try:  # YAML 1.1 reads 2e-5 (no dot) as text; what was meant is plain
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(number):
            raise ConfigError(f"{where}: expected a finite number, got {value!r}")
        return number
    if not isinstance(value, hint):
        raise wrong
    return value


def _name(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    if dataclasses.is_dataclass(hint):
        return "a section"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "a list"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return names.get(hint, getattr(hint, "__name__", str(hint)))
