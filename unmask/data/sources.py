"""Where training rows come from: one section, one call, every kind of source behind one small interface."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from unmask.data.conversation import Columns, Conversation, Message
from unmask.data.files import FileRows
from unmask.errors import DataError, FieldError
from unmask.sections import choice_problem, nearest

__all__ = ["Conversation", "DatasetConfig", "Message", "Rows", "open_rows"]

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_RENDERING = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
OnMalformed = Literal["error", "skip"]


@dataclass(frozen=True)
class DatasetConfig:
    """The `dataset` and `validation_dataset` sections.

    Attributes:
        path_or_dataset_id: a .jsonl, .json, .parquet or .arrow file, a folder of them, a folder that `datasets` saved,
            or a hub id `owner/name`. A path, or a name in a folder that is here, is never sent to the hub.
        name: the hub dataset's configuration.
        split: which split of a hub dataset, a saved folder, or a folder of files named after their splits.
        shuffle_seed: seed of the row order; null takes the run's seed.
        seq_length: longest row, in tokens.
        truncation: cut rows that are longer; false drops and counts them.
        unshifted: must be true: a diffusion model predicts the token at its own position.
        mask_history: supervise the last assistant turn only.
        tokenizer: folder or hub id of the tokenizer; null takes the model's.
        chat_template: name of one of ours ("llada", "diffusion_gemma") or path of a .jinja file; null takes the
            tokenizer's.
        chat_template_kwargs: values for the template's own variables, such as enable_thinking; null for none.
        supervise_reasoning: supervise the reasoning of the assistant's turns that is rendered, too.
        prompt_column: with `completion_column`, the columns of one-turn rows; null for chat rows.
        completion_column: see `prompt_column`.
        max_samples: use the first rows only; null for all.
        on_malformed: "error" stops at a malformed row, "skip" leaves it out and counts it.
    """

    path_or_dataset_id: str
    name: str | None = None
    split: str | None = None
    shuffle_seed: int | None = None
    seq_length: int = 1024
    truncation: bool = True
    unshifted: bool = True
    mask_history: bool = False
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    supervise_reasoning: bool = False
    prompt_column: str | None = None
    completion_column: str | None = None
    max_samples: int | None = None
    on_malformed: OnMalformed = "error"

    def __post_init__(self) -> None:
        for field in ("path_or_dataset_id", "name", "split", "tokenizer", "chat_template"):
            if getattr(self, field) is not None and not getattr(self, field).strip():
                raise FieldError(field, "is empty")
        for name, value in (self.chat_template_kwargs or {}).items():
            _check_variable(name, value)
        if not self.unshifted:
            raise FieldError("unshifted", "a diffusion model predicts the token at its own position; set it to true")
        if self.seq_length < 2:
            raise FieldError("seq_length", f"must be at least 2 tokens, got {self.seq_length}")
        if self.max_samples is not None and self.max_samples < 1:
            raise FieldError("max_samples", f"must be at least 1, or null for all rows, got {self.max_samples}")
        if (self.prompt_column is None) != (self.completion_column is None):
            given, other = ("prompt_column", "completion_column")[:: 1 if self.prompt_column is not None else -1]
            raise FieldError(other, f"must be set too, since {given} is; or delete both")
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise FieldError("completion_column", f"is the prompt column, {self.prompt_column!r}, too")
        if self.on_malformed not in get_args(OnMalformed):
            raise FieldError("on_malformed", choice_problem(self.on_malformed, get_args(OnMalformed)))

    @property
    def columns(self) -> Columns:
        """The prompt and completion columns."""
        return Columns(self.prompt_column, self.completion_column)


def _check_variable(name: object, value: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise FieldError("chat_template_kwargs", f"{name!r} is no name of a template's variable")
    field = f"chat_template_kwargs.{name}"
    if name == "supervise_reasoning":
        raise FieldError(field, "has a field of its own; set dataset.supervise_reasoning")
    if name in _RENDERING or name.endswith("_token"):
        raise FieldError(field, "is set by what renders a conversation; remove it")
    if not (value is None or isinstance(value, (bool, int, float, str))):
        raise FieldError(field, f"must be true or false, a number, text or null, got {value!r}")


class Rows(Protocol):
    """A source of conversations with random access; opening it is all the work that is done ahead.

    Attributes:
        skipped: for each malformed row left out at opening, its place and what is wrong.
        fingerprint: identity of the content (name, size, number of rows, both ends), cheap to compute.
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
    """Open a source.

    Args:
        config: its section.
        where: name of the section, for messages.

    Raises:
        DataError: nothing there, nothing in it, not readable, malformed (with file and line), or ambiguous splits.
    """
    text = config.path_or_dataset_id
    path = Path(text).expanduser()
    if not path.exists():
        if _looks_local(text):
            raise DataError(f"{where}.path_or_dataset_id: {_missing(path)}")
        if not _HUB_ID.fullmatch(text):
            raise DataError(
                f"{where}.path_or_dataset_id: {text!r} is neither an existing file or folder nor a hub id owner/name"
            )
        from unmask.data.tables import TableRows, read_hub

        table = read_hub(text, config.name, config.split, where)
        return TableRows(table, text, config.columns, where, config.max_samples)
    if config.name is not None:
        raise DataError(f"{where}.name: {text} is local, and only hub datasets have configurations; delete it")
    if path.is_dir():
        return _open_folder(path, config, where)
    if config.split is not None:
        raise DataError(f"{where}.split: {text} is one file and has no splits; delete it ({where}.max_samples cuts it)")
    return _open_file(path, config, where, config.max_samples)


def _open_file(path: Path, config: DatasetConfig, where: str, max_rows: int | None) -> Rows:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{where}.path_or_dataset_id: {path} is none of {', '.join(SUFFIXES)}")
    if path.suffix in (".jsonl", ".json"):
        return FileRows(path, config.columns, where, config.on_malformed == "skip", max_rows)
    from unmask.data.tables import TableRows, read_table

    return TableRows(read_table(path), str(path), config.columns, where, max_rows)


def _open_folder(path: Path, config: DatasetConfig, where: str) -> Rows:
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        from unmask.data.tables import TableRows, read_saved

        table = read_saved(path, config.split, where)
        return TableRows(table, str(path), config.columns, where, config.max_samples)
    parts: list[Rows] = []
    left = config.max_samples
    for file in _split_files(path, config.split, where):
        if left is None or left > 0:
            parts.append(_open_file(file, config, where, left))
            left = None if left is None else left - len(parts[-1])
    return parts[0] if len(parts) == 1 else ConcatRows(parts)


def _split_files(path: Path, split: str | None, where: str) -> list[Path]:
    """Return the data files of a folder, of one split if its files are named after splits."""
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{where}.path_or_dataset_id: {path} holds no {', '.join(SUFFIXES)} file and no saved dataset")
    splits = {file: next((word for word in re.split(r"[-_.]", file.stem) if word in _SPLITS), None) for file in files}
    names = sorted({name for name in splits.values() if name is not None})
    if split is None:
        if len(set(splits.values())) > 1:
            raise DataError(
                f"{where}.split: the files of {path} belong to several splits ({', '.join(names)}); set {where}.split, "
                "or name one file"
            )
        return files
    if split not in names:
        found = ", ".join(names) or "no splits"
        raise DataError(f"{where}.split: {path} has {found}, not {split!r}{nearest(split, names)}")
    return [file for file in files if splits[file] == split]


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
