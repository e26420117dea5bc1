"""Which files of a folder are data, and of which split: the layouts of a repository of the Hugging Face hub.

The rules are those of `datasets` (`data_files.py`, `utils/metadata.py`): hidden files, folders like `__pycache__` and
files that describe a data set are no data; a file's split stands in its name or in that of a folder above it; where
README.md lists configurations, each says which files are its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import DataError, nearest
from unmask.parsing import parse_yaml
from unmask.places import read_bytes, user_path

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_CARD = "README.md"
_DESCRIPTIONS = frozenset(("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"))
# A word that names a split → the split.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_WORDS)})(?=[-._ 0-9]|$)")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
# Data that is not read: left out in silence it would be missed.
_UNREAD = re.compile(rf"\.(?:csv|tsv|ndjson|(?:{'|'.join(s[1:] for s in SUFFIXES)}|csv|tsv)\.(?:gz|bz2|xz|zst|zip))$")


def split_files(folder: Path, name: str | None, split: str | None, where: str) -> list[Path]:
    """Return the data files of a folder in order: those of one configuration, `name`, and of one split.

    Raises:
        DataError: there are none, or which configuration or split to take is not said; `where` names the section.
    """
    splits = _configuration(folder, name, where)
    names = sorted({each for each in splits.values() if each is not None})
    if split is None:
        if len(set(map(_same, splits.values()))) > 1:
            others = [str(file.relative_to(folder)) for file, each in splits.items() if each is None]
            none = f"; {others[0]} is of none" if others else ""
            raise DataError(
                f"{where}.split: the files of {folder} belong to several splits ({', '.join(names)}{none}); set "
                f"{where}.split, or name one file"
            )
        return list(splits)
    if split == "train" and not names:  # the one split of a repository that names none
        return list(splits)
    asked = {split} if split in names else {each for each in names if _same(each) == _same(split)}
    if not asked:
        existing = ", ".join(names) or "no splits"
        raise DataError(f"{where}.split: {folder} has {existing}, not {split!r}{nearest(split, names)}")
    return [file for file, each in splits.items() if each in asked]


def _same(split: str | None) -> str | None:
    """Return what a split is called, whichever of its words names it."""
    return None if split is None else _WORDS.get(split, split)


def _configuration(folder: Path, name: str | None, where: str) -> dict[Path, str | None]:
    """Return the data files of one configuration of a folder, and each one's split."""
    listed = _listed(folder / _CARD)
    if not listed:
        if name is not None:
            raise DataError(f"{where}.name: {folder} has no {_CARD} that lists configurations; delete it")
        return _by_names(folder, where)
    if name is None:
        default = [key for key, entry in listed.items() if len(listed) == 1 or key == "default" or entry.get("default")]
        if len(default) != 1:
            raise DataError(
                f"{where}.name: {folder / _CARD} lists the configurations {', '.join(listed)} and no one default; set "
                f"{where}.name"
            )
        name = default[0]
    elif name not in listed:
        raise DataError(
            f"{where}.name: {folder / _CARD} lists the configurations {', '.join(listed)}, not {name!r}"
            f"{nearest(name, listed)}"
        )
    return _by_patterns(folder, name, listed[name], where)


def _listed(card: Path) -> dict[str, Mapping[str, Any]]:
    """Return the configurations that the metadata at the top of a README.md lists, by name."""
    try:
        metadata = re.match(r"---\n(.*?\n)---\n", read_bytes(card).decode("utf-8-sig").replace("\r\n", "\n"), re.DOTALL)
        if metadata is None or re.search(r"^configs:", metadata[1], re.MULTILINE) is None:
            return {}
        return {str(entry["config_name"]): dict(entry) for entry in parse_yaml(metadata[1])["configs"] or ()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{card}: its list of configurations cannot be read; mend it, or name a file") from None


def _by_patterns(folder: Path, name: str, entry: Mapping[str, Any], where: str) -> dict[Path, str | None]:
    """Return the files that a configuration of README.md names, and each one's split."""
    patterns = entry.get("data_files")
    if patterns is None:
        return _by_names(folder / _inside(folder, str(entry.get("data_dir", "")), name), where)
    splits: dict[Path, str | None] = {}
    try:
        for item in [patterns] if isinstance(patterns, (str, dict)) else patterns:
            split, paths = ("train", item) if isinstance(item, str) else (str(item["split"]), item["path"])
            for pattern in [paths] if isinstance(paths, str) else paths:
                matches = _data(folder, folder.glob(_inside(folder, pattern, name)), where)
                if not matches:
                    raise DataError(f"{folder / _CARD}: no file of configuration {name!r} matches {pattern!r}")
                splits.update(dict.fromkeys(matches, split))
    except (ValueError, TypeError, KeyError, NotImplementedError):
        raise DataError(
            f"{folder / _CARD}: the data_files of configuration {name!r} cannot be read; mend them, or name a file"
        ) from None
    return splits


def _inside(folder: Path, path: str, name: str) -> str:
    """Return a path that a card names; DataError where it leaves the card's folder."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DataError(
            f"{folder / _CARD}: configuration {name!r} names {path!r}, outside its folder, which is not read; name "
            "files within it"
        )
    return path


def _by_names(folder: Path, where: str) -> dict[Path, str | None]:
    """Return all data files below a folder, and each one's split as the names say; None = they say nothing."""
    files = _data(folder, folder.rglob("*"), where)
    if not files:
        raise DataError(
            f"{where}.path_or_dataset_id: {folder} holds no {', '.join(SUFFIXES)} file and no saved dataset"
        )
    return {file: _split_of(file.relative_to(folder)) for file in files}


def _data(folder: Path, files: Iterable[Path], where: str) -> list[Path]:
    """Return the data files among some below a folder, in order; refuse data of a form that is not read."""
    found = []
    for file in sorted(files):
        above = file.relative_to(folder).parts[:-1]
        hidden = file.name.startswith(".") or any(part.startswith((".", "__")) for part in above)
        if hidden or file.name in _DESCRIPTIONS or file.is_dir():
            continue
        if file.suffix in SUFFIXES:
            user_path(file, f"{where}.path_or_dataset_id")  # refused: a link to nothing, a pipe
        if _UNREAD.search(file.name):
            raise DataError(
                f"{where}.path_or_dataset_id: {file} is none of {', '.join(SUFFIXES)}; convert or unpack it, move it "
                "away, or name one file"
            )
        if file.suffix in SUFFIXES:
            found.append(file)
    return found


def _split_of(file: Path) -> str | None:
    """Return the split that a path within a folder names: as a shard of one, by a folder, or by the file's name."""
    shard = _SHARD.match(file.name)
    if shard is not None:
        return shard[1]
    for part in (*file.parts[-2::-1], file.stem):
        word = _WORD.search(part)
        if word is not None:
            return word[1]
    return None
