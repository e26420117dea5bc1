"""A small byte-level BPE tokenizer with a family's control tokens, trained on given texts, for fresh models.

Digits stay single tokens, so that arithmetic is done on digits and not on arbitrary chunks of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unmask.errors import ModelError
from unmask.models.family import ControlTokens

_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int, controls: ControlTokens) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) with a family's control tokens.

    Args:
        texts: what to learn merges from.
        vocab_size: most ids, control tokens and the 256 bytes included; fewer when the texts give fewer merges.
        controls: the family's; they have the first ids.

    Raises:
        ModelError: a vocabulary too small for the bytes.
    """
    least = _BYTES + len(controls.tokens)
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
