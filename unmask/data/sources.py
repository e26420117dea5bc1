"""Where training rows come from: one section, one call, every kind of source behind one small interface."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from unmask.config.data import DatasetConfig
from unmask.data.conversation import Conversation
from unmask.data.files import FileRows
from unmask.data.formats import Columns
from unmask.data.layout import SUFFIXES, split_files
from unmask.data.tables import TableRows, read_hub, read_saved, read_table
from unmask.errors import DataError, nearest
from unmask.places import user_path

_POINTER = b"version https://git-lfs.github.com/spec/"  # how a clone without Git LFS has a large file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Rows(Protocol):
    """A source of conversations with random access; opening it is all the work that is done ahead.

    Attributes:
        skipped: for each malformed row left out at opening, its place and what is wrong.
        fingerprint: identity of the content, wherever it lies: all of it, or size and both ends of files above 1 GiB.
    """

    @property
    def skipped(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Conversation:
        """Return row `index`; DataError if it is malformed or can no longer be read."""
        ...

    def text_length(self, index: int, /) -> int:
        """Return a cheap stand-in for the row's length, in bytes or characters."""
        ...

    def describe(self, index: int, /) -> str:
        """Return the row's place as a person would look it up."""
        ...


class ConcatRows:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in self.parts))
        self.skipped: list[str] = [reason for part in self.parts for reason in part.skipped]
        self.fingerprint = blake2b("".join(p.fingerprint for p in self.parts).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        part, inner = self._find(index)
        return part[inner]

    def text_length(self, index: int) -> int:
        """Return the row's length as its own source measures it."""
        part, inner = self._find(index)
        return part.text_length(inner)

    def describe(self, index: int) -> str:
        """Return the row's place in its own source."""
        part, inner = self._find(index)
        return part.describe(inner)

    def _find(self, index: int) -> tuple[Rows, int]:
        number = bisect_right(self.ends, index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)


def open_rows(config: DatasetConfig, where: str = "dataset") -> Rows:
    """Open a source, as its section says; `where` names that section in messages.

    Raises:
        DataError: nothing there, nothing in it, not readable, malformed (with file and line), or ambiguous splits.
    """
    text = config.path_or_dataset_id
    path = user_path(text, f"{where}.path_or_dataset_id")
    if not path.exists():
        if _looks_local(text):
            raise DataError(f"{where}.path_or_dataset_id: {_missing(path)}")
        if not _HUB_ID.fullmatch(text):
            raise DataError(
                f"{where}.path_or_dataset_id: {text!r} is neither an existing file or folder nor a hub id owner/name"
            )
        table = read_hub(text, config.name, config.split, where)
        return TableRows(table, text, _columns(config), where, config.max_samples)
    if path.is_dir():
        return _open_folder(path, config, where)
    if config.name is not None:
        raise DataError(f"{where}.name: {text} is one file and has no configurations; delete it")
    if config.split is not None:
        raise DataError(f"{where}.split: {text} is one file and has no splits; delete it ({where}.max_samples cuts it)")
    return _open_file(path, config, where, config.max_samples)


def _columns(config: DatasetConfig) -> Columns:
    return Columns(config.prompt_column, config.completion_column, frozenset(config.ignore_keys or ()))


def _open_file(path: Path, config: DatasetConfig, where: str, max_rows: int | None) -> Rows:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{where}.path_or_dataset_id: {path} is none of {', '.join(SUFFIXES)}")
    if _is_pointer(path):
        raise DataError(f"{path}: a Git LFS pointer in place of the data; fetch them with `git lfs pull`")
    if path.suffix in (".jsonl", ".json"):
        return FileRows(path, _columns(config), where, config.on_malformed == "skip", max_rows)
    return TableRows(read_table(path), str(path), _columns(config), where, max_rows)


def _is_pointer(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False  # whoever reads it says why


def _open_folder(path: Path, config: DatasetConfig, where: str) -> Rows:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        if config.name is not None:
            raise DataError(f"{where}.name: {path} is a saved dataset and has no configurations; delete it")
        table = read_saved(path, config.split, where)
        return TableRows(table, str(path), _columns(config), where, config.max_samples)
    parts: list[Rows] = []
    left = config.max_samples
    for file in split_files(path, config.name, config.split, where):
        if left is None or left > 0:
            parts.append(_open_file(file, config, where, left))
            left = None if left is None else left - len(parts[-1])
    return parts[0] if len(parts) == 1 else ConcatRows(parts)


def _looks_local(text: str) -> bool:
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text or Path(text).suffix in SUFFIXES:
        return True
    return "/" in text and Path(text).parent.is_dir()


def _missing(path: Path) -> str:
    """Say that a path is not there, and what is there instead."""
    path = path.absolute()
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    wanted = path.relative_to(parent).parts[0]
    try:
        hint = nearest(wanted, [entry.name for entry in parent.iterdir()])
    except OSError:
        hint = ""
    kind = "file" if path.suffix in SUFFIXES else "file or folder"
    within = f"; {parent} has no {wanted}" if parent != path.parent else ""
    return f"no such {kind}: {path}{within}{hint}"
