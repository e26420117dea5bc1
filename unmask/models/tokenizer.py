"""Tokenizers: a checkpoint's, loaded without running its code, or one trained from scratch. No torch until then."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.errors import ModelError
from unmask.models.family import ControlTokens
from unmask.models.folders import candidates, find_adapter, find_folder, read_json
from unmask.models.registry import register_configs
from unmask.places import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def find_tokenizer(name: str, where: str = "tokenizer") -> Path:
    """Return the folder that holds a tokenizer's files; ModelError says where it looked. Needs no torch."""
    path = user_path(name, where)
    # The model that would be taken comes first, so that both are of one folder.
    for candidate in sorted(candidates(path), key=lambda folder: not (folder / "config.json").is_file()):
        if any((candidate / file).is_file() for file in FILES):
            return candidate
    folder = find_folder(name, where, weights=False)
    if not any((folder / file).is_file() for file in FILES):
        raise ModelError(f"{where}: {folder} has no tokenizer ({' or '.join(FILES[:2])}); name one that has")
    return folder


def load_tokenizer(name: str, where: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a folder, a run directory or a hub id; ModelError when none can be read there."""
    folder = find_tokenizer(name, where)
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

    register_configs()  # released config.json files name remote code, and AutoTokenizer would stop to ask about it
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    config = None
    if values.get("model_type") not in CONFIG_MAPPING:  # of a config.json only the tokenizer's class is asked
        config = PreTrainedConfig(**{key: values[key] for key in values.keys() & {"tokenizer_class"}})
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for unreadable files
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{where}: the tokenizer in {folder} cannot be loaded ({reason})") from error


def tokenizer_folder(checkpoint: str, adapter: str | None, where: str = "--checkpoint") -> Path:
    """Return the folder of the adapter's tokenizer, whose chat template it was trained with, or of the checkpoint's.

    Raises:
        ModelError: neither has one.
    """
    if adapter is not None:
        folder = find_adapter(adapter)
        if any((folder / file).is_file() for file in FILES):
            return folder
    return find_tokenizer(checkpoint, where)


def train_tokenizer(texts: Iterable[str], vocab_size: int, controls: ControlTokens) -> PreTrainedTokenizerBase:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) with a family's control tokens, for fresh models.

    Digits stay single tokens, so that arithmetic is done on digits and not on arbitrary chunks of numbers.

    Args:
        texts: what to learn merges from.
        vocab_size: most ids, control tokens and the 256 bytes included; fewer when the texts give fewer merges.
        controls: the family's; they have the first ids.

    Raises:
        ModelError: a vocabulary too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(controls.tokens)
    if vocab_size < least:
        raise ModelError(f"vocab_size: {vocab_size} is below the {least} of bytes and control tokens; raise it")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(controls.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **controls.roles)
