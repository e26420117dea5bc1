"""`python docs/write_tables.py`: the tables of docs/configuration.md, from the sections themselves."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from unmask.config import RunConfig
from unmask.config.reader import described

PAGE = Path(__file__).with_name("configuration.md")
_HEAD = "| field | type | default | meaning |\n|---|---|---|---|\n"
_TABLE = re.compile(re.escape(_HEAD) + r"(?:\|.*\n)*")
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


def sections() -> Iterator[tuple[str, type]]:
    """Yield (name, dataclass) of every section."""
    for name, hint in typing.get_type_hints(RunConfig).items():
        for option in _options(hint):
            if dataclasses.is_dataclass(option):
                yield name, typing.cast(type, option)


def written(page: str) -> str:
    """Return the page with the first table under each section's heading made anew."""
    parts = re.split(r"^(?=## `\w+`$)", page, flags=re.MULTILINE)
    known = dict(sections())
    for place, part in enumerate(parts):
        heading = re.match(r"## `(\w+)`", part)
        if heading and _TABLE.search(part):
            parts[place] = _TABLE.sub(lambda _, section=known[heading[1]]: _table(section), part, count=1)
    return "".join(parts)


def _table(section: type) -> str:
    hints, meanings = typing.get_type_hints(section), described(section)
    rows = (
        f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} | {meanings[field.name]} |\n"
        for field in dataclasses.fields(section)  # pyright: ignore[reportArgumentType]
    )
    return _HEAD + "".join(rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"`{value:g}`".replace("e-0", "e-")
    return (
        f"`{value}`"
        if isinstance(value, str)
        else f"`{yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}`"
    )


def _type(hint: Any) -> str:
    options = _options(hint)
    words = [_word(option) for option in options if option is not type(None)]
    return " or ".join([*words, *(["null"] if type(None) in options else [])])


def _word(option: Any) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {_WORDS[arguments[0]]}"
    if origin is tuple:
        return f"{len(arguments)} {_WORDS[arguments[0]]}s"
    return _WORDS.get(option, "mapping")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
