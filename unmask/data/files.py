"""Rows of a local JSONL or JSON file: where each row's bytes are, and nothing else, is kept in memory.

Opening reads the file once, checks every row and keeps its byte offsets; a row is then read and parsed when it is asked
for. So a file larger than memory works, and a mistake in its last line shows before training starts.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from unmask.data.conversation import Conversation, RowProblem
from unmask.data.formats import Columns, check_row, read_conversation
from unmask.data.keys import read_object
from unmask.errors import DataError
from unmask.places import check_regular

_BLANK = " \t\r\n"
_BOM = b"\xef\xbb\xbf"
_WHOLE = 1 << 30  # bytes of a file that identify it, all of them; of a larger one its size and both ends
_EDGE = 1 << 16


class FileRows:
    """The rows of one JSONL or JSON file.

    Args:
        where: name of the configuration section, for messages.
        skip_malformed: leave malformed rows out and list them in `skipped`, instead of raising.
        max_rows: read no more than the first `max_rows` rows that are well-formed.

    Raises:
        DataError: unreadable, empty, or a malformed row; the message names file, line, problem and remedy.
    """

    def __init__(
        self, path: Path, columns: Columns, where: str, skip_malformed: bool = False, max_rows: int | None = None
    ) -> None:
        self.path = path
        self.columns = columns
        self.skipped: list[str] = []
        places = array("q")  # start, end and line number of each row
        try:
            check_regular(path)
            for start, end, line, problem in _scan(path, columns):
                if max_rows is not None and len(places) >= 3 * max_rows:
                    break
                if problem is None:
                    places.extend((start, end, line))
                elif skip_malformed:
                    self.skipped.append(f"{path}:{line}: {problem}")
                else:
                    raise DataError(f"{path}:{line}: {problem}; {problem.remedy(where)}")
            self.fingerprint = files_digest([path], places[-2] if places else 0)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not places:
            why = f"all {len(self.skipped)} are malformed, {self.skipped[0]}" if self.skipped else "the file is empty"
            raise DataError(f"{path}: no rows, {why}; give {where} a file with conversations")
        self.places = np.frombuffer(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Conversation:
        start, end, _ = self.places[index].tolist()
        try:
            # Opened for every row: no handle to leak, to share between workers, or to lose when pickled.
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                raw = file.read(end - start)
            return read_conversation(json.loads(raw.decode()), self.columns)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{self.describe(index)}: the file has changed since it was opened ({error})") from None

    def text_length(self, index: int) -> int:
        """Return the row's bytes in the file."""
        start, end, _ = self.places[index].tolist()
        return end - start

    def describe(self, index: int) -> str:
        """Return `file:line`."""
        return f"{self.path}:{self.places[index][2]}"


def _scan(path: Path, columns: Columns) -> Iterator[tuple[int, int, int, RowProblem | None]]:
    """Yield each row's start byte, end byte, line number (from 1) and what is wrong with it, None for nothing."""
    if path.suffix != ".json":
        return _scan_lines(path, columns)
    # Many tools write JSON lines under the name .json: a first line that is an object of its own, then more.
    with open(path, "rb") as file:
        lines = (line.strip() for line in file if line.strip())
        first, second = next(lines, b"").removeprefix(_BOM), next(lines, b"")
    if not first.startswith(b"{"):
        return _scan_document(path, columns)
    if _is_json(first):
        are_lines = bool(second) or _is_row(first, columns)
    else:  # a document over several lines, or lines of which the first is malformed
        are_lines = _is_json(second) and not _is_json(path.read_bytes().removeprefix(_BOM))
    return (_scan_lines if are_lines else _scan_document)(path, columns)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_row(line: bytes, columns: Columns) -> bool:
    try:
        check_row(json.loads(line), columns)
    except (ValueError, RecursionError):
        return False
    return True


def _scan_lines(path: Path, columns: Columns) -> Iterator[tuple[int, int, int, RowProblem | None]]:
    end = 0
    decode = _DECODER.raw_decode  # half the time of json.loads on short rows
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            start, end = end, end + len(raw)
            if line == 1 and raw.startswith(_BOM):
                start, raw = start + len(_BOM), raw[len(_BOM) :]
            if raw.isspace() or not raw:
                continue
            problem = None
            try:
                text = raw.decode().strip(_BLANK)
                row, length = decode(text)
                if length != len(text):
                    raise json.JSONDecodeError("Extra data", text, length)
                check_row(row, columns)
            except RowProblem as error:
                problem = error
            except ValueError as error:
                problem = RowProblem(_json_problem(error, torn=not raw.endswith(b"\n")))
            except RecursionError:
                problem = RowProblem("nested too deeply")
            yield start, end, line, problem


def _json_problem(error: ValueError, torn: bool = False) -> str:
    if isinstance(error, UnicodeDecodeError):
        problem = f"not UTF-8 (byte {error.object[error.start]:#04x} at byte {error.start + 1} of the row)"
    elif isinstance(error, json.JSONDecodeError):
        problem = f"not JSON ({error.msg} at character {error.colno} of the row)"
    else:
        problem = f"not JSON ({error})"
    return f"{problem}; the file ends inside this row, so it may have been cut short" if torn else problem


def _scan_document(path: Path, columns: Columns) -> Iterator[tuple[int, int, int, RowProblem | None]]:
    """Yield the rows of a file that is one JSON document: a list of rows, or an object with a single list."""
    raw = path.read_bytes()
    start = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        text = raw[start:].decode()
        rows, first = _document_rows(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, start + error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at character {error.colno} of the line); "
            "the file may have been cut short"
        ) from None
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            f"{path}: {problem}; give a list of rows, or an object with a single list, each key once"
        ) from None
    # Offsets count characters so far; rows are read by bytes.
    byte, place, line = start, 0, 1
    for row in rows:
        begin = _skip(text, place if place else first, "," + _BLANK)
        end = _PLAIN.raw_decode(text, begin)[1]
        byte += len(text[place:begin].encode())
        line += text.count("\n", place, begin)
        size = len(text[begin:end].encode())
        problem = None
        try:
            _DECODER.raw_decode(text, begin)
            check_row(row, columns)
        except RowProblem as error:
            problem = error
        except RecursionError:
            problem = RowProblem("nested too deeply")
        yield byte, byte + size, line, problem
        byte, line, place = byte + size, line + text.count("\n", begin, end), end


def _document_rows(text: str) -> tuple[list[object], int]:
    """Return the rows of a JSON document and the character at which the first one may start."""
    document = json.loads(text)
    if isinstance(document, list):
        return document, text.index("[") + 1
    if not isinstance(document, dict):
        raise RowProblem("not a list of rows")
    members: list[tuple[str, object]] = []
    lists: dict[str, int] = {}  # the place behind each one's bracket
    place = text.index("{") + 1
    while text[place := _skip(text, place, "," + _BLANK)] != "}":
        key, place = _PLAIN.raw_decode(text, place)
        place = _skip(text, place, ":" + _BLANK)
        is_list = text[place] == "["
        if is_list:
            lists[key] = place + 1
        # The keys of rows are looked at row by row.
        value, place = (_PLAIN if is_list else _DECODER).raw_decode(text, place)
        members.append((key, value))
    read_object(members)
    if len(lists) != 1:
        names = f" ({', '.join(lists)})" if lists else ""
        raise RowProblem(f"an object with {len(lists)} lists{names}, so which one holds the rows is unknown")
    ((key, first),) = lists.items()
    return document[key], first


_PLAIN = json.JSONDecoder()
_DECODER = json.JSONDecoder(object_pairs_hook=read_object)  # refuses repeated keys


def _skip(text: str, place: int, characters: str) -> int:
    while text[place] in characters:
        place += 1
    return place


def files_digest(paths: Sequence[Path], end: int | None = None) -> str:
    """Return a hash of what some files hold, up to a byte `end` of each if given; raises OSError."""
    digest = blake2b(digest_size=16)
    for path in paths:
        size = os.path.getsize(path) if end is None else end
        digest.update(f"{size}\x1f".encode())
        with open(path, "rb") as file:
            for start, stop in [(0, size)] if size <= _WHOLE else [(0, _EDGE), (size - _EDGE, size)]:
                file.seek(start)
                while start < stop and (chunk := file.read(min(stop - start, 1 << 20))):
                    digest.update(chunk)
                    start += len(chunk)
    return digest.hexdigest()
