"""Rows of a table that `datasets` holds: Parquet, Arrow, a saved dataset folder or a dataset of the hub.

A table can be far larger than memory, so its rows are checked when they are read, its columns when it is opened.
"""

from __future__ import annotations

import json
import logging
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unmask.data.conversation import Conversation, RowProblem
from unmask.data.files import files_digest
from unmask.data.formats import FORMATS, Columns, read_conversation
from unmask.errors import DataError, nearest


class TableRows:
    """The rows of one `datasets.Dataset`, which messages call `label`; arguments as in `files.FileRows`.

    Raises:
        DataError: no rows, no column that holds conversations, or what is stored is no such table: offsets that lead
            out of it, texts that are not UTF-8.
    """

    def __init__(self, table: Any, label: str, columns: Columns, where: str, max_rows: int | None = None) -> None:
        if columns.format_of(table.column_names) is None:
            formats = [columns[:2]] if columns.prompt is not None else [format.keys for format in FORMATS]
            wanted = " or ".join(" and ".join(map(repr, keys)) for keys in formats)
            raise DataError(
                f"{label}: no column {wanted} among {', '.join(table.column_names) or 'none'}; "
                f"name the ones that hold the text in {where}.prompt_column and {where}.completion_column"
            )
        if len(table) == 0:
            raise DataError(f"{label}: no rows; give {where} one with conversations")
        try:  # the files are mapped into memory, and a wrong offset would read what lies beside them
            table.data.validate(full=True)
        except Exception as error:
            raise DataError(f"{label}: the table is damaged ({_first_line(error)}); write or fetch it again") from None
        self.table = table if max_rows is None else table.select(range(min(max_rows, len(table))))
        self.label = label
        self.columns = columns
        self.where = where
        self.skipped: list[str] = []
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Conversation:
        try:
            return read_conversation(self._row(index), self.columns)
        except RowProblem as error:
            raise DataError(f"{self.describe(index)}: {error}; {error.remedy(self.where)}") from None

    def text_length(self, index: int) -> int:
        """Return the characters of the row's turns; 0 for a malformed row."""
        try:
            turns = read_conversation(self._row(index), self.columns).messages
            return sum(len(turn.content) + len(turn.reasoning) for turn in turns)
        except RowProblem:
            return 0

    def describe(self, index: int) -> str:
        """Return `label row n`, rows counted from 0 as `datasets` does."""
        return f"{self.label} row {index}"

    def _row(self, index: int) -> dict[str, Any]:
        return {name: _as_written(value) for name, value in self.table[index].items()}

    def _fingerprint(self) -> str:
        # Not the fingerprint of `datasets`, which changes with the cache's file times.
        files = [Path(entry["filename"]) for entry in self.table.cache_files]
        edges = [self.table[index] for index in sorted({0, len(self.table) // 2, len(self.table) - 1})]
        identity = json.dumps([len(self.table), edges, files_digest(files)], default=str, sort_keys=True)
        return blake2b(identity.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _as_written(value: Any) -> Any:
    """Return a value as its row was written, before it was stored in a table.

    Bytes that hold a text are text. An object has no nulls: in a table each has the fields of all, those that the row
    did not write null.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # refused where text must be
    if isinstance(value, dict):
        return {name: _as_written(item) for name, item in value.items() if item is not None}
    return [_as_written(item) for item in value] if isinstance(value, list) else value


def read_table(path: Path) -> Any:
    """Open a Parquet or Arrow file; DataError when it cannot be read as one."""
    try:
        dataset = _datasets().Dataset
        return dataset.from_file(str(path)) if path.suffix == ".arrow" else dataset.from_parquet(str(path))
    except Exception as error:  # datasets, pyarrow and the file system each raise their own
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {_first_line(error)}") from None


def read_saved(path: Path, split: str | None, where: str) -> Any:
    """Open a folder that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: it cannot be read, or does not say which of its splits to use.
    """
    try:
        saved = _datasets().load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a saved dataset: {_first_line(error)}") from None
    return _one_split(saved, str(path), split, where)


def read_hub(dataset_id: str, name: str | None, split: str | None, where: str) -> Any:
    """Open a dataset of the Hugging Face hub.

    Raises:
        DataError: not found, not reachable, or it does not say which of its configurations or splits to use.
    """
    try:
        loaded = _datasets().load_dataset(dataset_id, name, split=split)
    except Exception as error:  # network, hub, builder and file errors, each of a type of its own
        raise DataError(
            f"{where}.path_or_dataset_id: {dataset_id!r} is no local path and cannot be loaded from the hub: "
            f"{_first_line(error)}; check the id, {where}.name, {where}.split, the network and HF_HUB_OFFLINE"
        ) from None
    return loaded if split is not None else _one_split(loaded, dataset_id, None, where)


def _datasets() -> Any:
    import datasets  # takes seconds, and JSON needs none of it

    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well, and said in one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _one_split(loaded: Any, label: str, split: str | None, where: str) -> Any:
    if not isinstance(loaded, dict):
        if split is not None:
            raise DataError(f"{where}.split: {label} has no splits; delete it")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        asked = "which one is not said" if split is None else f"{split!r} is none of them{nearest(split, loaded)}"
        raise DataError(f"{where}.split: {label} has the splits {', '.join(loaded)} and {asked}; set {where}.split")
    return loaded[split]


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error  # "An error occurred while generating the dataset" has one that says more
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].rstrip(".") if lines else type(error).__name__)[:300]
