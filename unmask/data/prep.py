"""`unmask prep`: public datasets written as chat JSONL, ready for `dataset.path_or_dataset_id`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask.data.conversation import RowProblem
from unmask.data.formats import Columns, read_conversation
from unmask.data.tables import read_hub
from unmask.errors import DataError, choice_problem
from unmask.parsing import ParseProblem, parse_json
from unmask.places import check_regular, part_of, user_path

GSM8K_HUB_ID = "openai/gsm8k"
GSM8K_SPLITS = ("train", "test")
_GSM8K_COLUMNS = Columns("question", "answer")


def prep_gsm8k(source: str | None = None, output_dir: str | Path = ".", split: str = "all") -> list[Path]:
    """Write GSM8K as one-turn chats and return the files; answers keep the dataset's text, annotations included.

    Args:
        source: folder with train.jsonl and test.jsonl (`question`, `answer`), or a hub id; None is `openai/gsm8k`.
        output_dir: folder for gsm8k_chat_train.jsonl and gsm8k_chat_test.jsonl; made if missing.
        split: train, test or all.

    Raises:
        DataError: the source is missing or malformed, or the output cannot be written; what was there before stays.
    """
    if split not in (*GSM8K_SPLITS, "all"):
        raise DataError(f"--split: {choice_problem(split, (*GSM8K_SPLITS, 'all'))}")
    splits = GSM8K_SPLITS if split == "all" else (split,)
    folder = user_path(output_dir, "--output")
    sources = {name: _gsm8k_rows(source, name) for name in splits}
    written = []
    for name, rows in sources.items():
        path = folder / f"gsm8k_chat_{name}.jsonl"
        _write(path, (_chat(row, place) for place, row in rows))
        written.append(path)
    return written


PREPARERS: dict[str, Callable[..., list[Path]]] = {"gsm8k": prep_gsm8k}


def _chat(row: object, place: str) -> dict[str, Any]:
    try:
        messages = read_conversation(row, _GSM8K_COLUMNS).messages
    except RowProblem as error:
        raise DataError(f"{place}: {error}; a GSM8K row has a question and an answer") from None
    return {"messages": [{"role": message.role, "content": message.content} for message in messages]}


def _gsm8k_rows(source: str | None, split: str) -> Iterable[tuple[str, object]]:
    """Open one split; yields (place, row)."""
    text = GSM8K_HUB_ID if source is None else source
    path = user_path(text, "--source")
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.is_file():
            raise DataError(f"--source: {path} holds no {split}.jsonl; give the folder of a copy of GSM8K")
        return _lines(file)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise DataError(f"--source: {path.absolute()} is no folder with {split}.jsonl, and {text!r} is no hub id")
    table = read_hub(text, "main", split, "--source")
    return ((f"{text} {split} row {number}", row) for number, row in enumerate(table))


def _lines(file: Path) -> Iterator[tuple[str, object]]:
    try:
        check_regular(file)
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", parse_json(line, strict=False)
    except ParseProblem as error:
        raise DataError(f"{file}: a line is not JSON in UTF-8 ({error}); fetch the file again") from None


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines beside the target, then rename: a reader sees the old file or the whole new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part_of(path) as part:
            with part.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; choose another --output") from None
