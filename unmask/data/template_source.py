"""Where the source of a chat template comes from, and what a configuration sets in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from unmask.errors import DataError, nearest
from unmask.places import user_path

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def template_names() -> list[str]:
    """Return the names of the templates that come with the package."""
    folder = resources.files("unmask.data") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def remedy() -> str:
    """Return what to do about a template that training cannot use, as the end of a message."""
    names = " or ".join(template_names())
    return f"set dataset.chat_template: {names}, or the path of a template with {{% generation %}} tags"


def read_template(chat_template: str) -> str:
    """Return the source of a template: one of ours by name, or a file by path; DataError when it is neither."""
    if chat_template in template_names():
        return (resources.files("unmask.data") / "templates" / f"{chat_template}.jinja").read_text("utf-8")
    path = user_path(chat_template, "dataset.chat_template")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = template_names()
        raise DataError(
            f"dataset.chat_template: {chat_template!r} is neither a readable file ({' '.join(str(error).split())}) "
            f"nor one of our own: {', '.join(names)}{nearest(chat_template, names)}"
        ) from None


@cache
def words_of(source: str) -> frozenset[str]:
    """Return the words of a template, outside its comments: what is not among them it cannot know."""
    return frozenset(re.findall(r"\w+", _COMMENT.sub("", source)))


def with_variables(source: str, variables: Mapping[str, Any], name: str) -> str:
    """Return a template that starts by setting variables which its caller has not set.

    They are written into the source, which is saved with a run, so prompts have the form that training had. `name` is
    what messages call the template.

    Raises:
        DataError: a variable that the template never mentions.
    """
    words = words_of(source)
    for variable in variables:
        if variable not in words:
            raise DataError(
                f"dataset.chat_template_kwargs.{variable}: {name} does not know it, so it would change nothing; "
                f"remove it{nearest(variable, words)}"
            )
    # One line: templates are compiled with trim_blocks, which drops the line break after its last block.
    lines = (
        f"{{% if {variable} is not defined %}}{{% set {variable} = {_literal(value)} %}}{{% endif %}}"
        for variable, value in variables.items()
    )
    setting = "".join(lines)
    return f"{setting}\n{source}" if setting else source


def _literal(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
