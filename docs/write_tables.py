"""`python docs/write_tables.py`: the tables of configuration.md and sampling-reference.md, from the code itself."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from unmask.config import RunConfig
from unmask.config.reader import described
from unmask.config.sampler import SamplerConfig
from unmask.models.family import Family
from unmask.models.registry import FAMILIES, resolve
from unmask.sampling.settings import SCHEMES

PAGE = Path(__file__).with_name("configuration.md")
SAMPLING = Path(__file__).with_name("sampling-reference.md")
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


def sampling_written(page: str) -> str:
    """Return the page with the first table under `## Settings` and under `## Presets` made anew."""
    families = [resolve(target) for target in FAMILIES.values()]
    families, names = _columns(families)
    settings = [
        [f"`{name}`", *(_setting(family, name) for family in families), meaning]
        for name, meaning in described(SamplerConfig).items()
    ]
    presets = [
        [
            f"`{preset}`",
            *(
                _preset(family.sampler.presets[preset]) if preset in family.sampler.presets else "none"
                for family in families
            ),
        ]
        for preset in families[0].sampler.presets
    ]
    for heading, head, rows in (
        ("Settings", ["setting", *names, "meaning"], settings),
        ("Presets", ["preset", *names], presets),
    ):
        table = "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))
        page = re.sub(rf"(?<=^## {heading}\n)((?:(?!\|).*\n)*)(?:\|.*\n)+", rf"\1{table}", page, flags=re.MULTILINE)
    return page


def _columns(families: Sequence[Family]) -> tuple[list[Family], list[str]]:
    """Return one family of each way to sample, and the names of all that have it."""
    alike: dict[str, list[Family]] = {}
    for family in families:
        alike.setdefault(repr((family.noise, family.attention, family.sampler)), []).append(family)
    return [group[0] for group in alike.values()], [", ".join(each.name for each in group) for group in alike.values()]


def _setting(family: Family, name: str) -> str:
    """Return a family's default of a setting; a dash where its sampler has no such setting."""
    if name in family.sampler.from_config:
        return f"`{family.sampler.from_config[name]}`"
    if name in family.sampler.values:
        return f"`{family.sampler.values[name]}`"
    return "none" if name == "preset" or name in SCHEMES[family.noise, family.attention].fields else "–"


def _preset(values: Any) -> str:
    return ", ".join(f"`{name}: {value}`" for name, value in values.items()) or "the family's defaults"


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
    SAMPLING.write_text(sampling_written(SAMPLING.read_text(encoding="utf-8")), encoding="utf-8")
