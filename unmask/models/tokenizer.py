"""Loading a checkpoint's tokenizer without running code that came with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unmask.errors import ModelError
from unmask.models.folders import find_adapter, find_folder

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def find_tokenizer(name: str, where: str = "tokenizer") -> Path:
    """Return the folder that holds a tokenizer's files; ModelError says where it looked. Needs no torch."""
    from pathlib import Path

    path = Path(name).expanduser()
    for candidate in (path, path / "latest"):
        if any((candidate / file).is_file() for file in FILES):
            return candidate
    folder = find_folder(name, where, weights=False)
    if not any((folder / file).is_file() for file in FILES):
        raise ModelError(f"{where}: {folder} has no tokenizer ({' or '.join(FILES[:2])}); name one that has")
    return folder


def load_tokenizer(name: str, where: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a folder, a run directory or a hub id.

    Raises:
        ModelError: no tokenizer there, or files that transformers cannot read.
    """
    folder = find_tokenizer(name, where)
    from transformers import AutoTokenizer

    from unmask.models.llada.auto_config import register_config

    register_config()  # released config.json files name remote code, and AutoTokenizer would stop to ask about it
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for unreadable files
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{where}: the tokenizer in {folder} cannot be loaded ({reason})") from error


def tokenizer_folder(checkpoint: str, adapter: str | None, where: str = "--checkpoint") -> Path:
    """Return the folder of the tokenizer to use: the adapter's, whose chat template it was trained with, if it has one.

    Raises:
        ModelError: neither has one.
    """
    if adapter is not None:
        folder = find_adapter(adapter)
        if any((folder / file).is_file() for file in FILES):
            return folder
    return find_tokenizer(checkpoint, where)
