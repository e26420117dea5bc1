"""A small byte-level BPE tokenizer with LLaDA's control tokens, trained on given texts, for models made from scratch.

Digits stay single tokens, so that arithmetic is done on digits and not on arbitrary chunks of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from unmask.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# In the order of their ids, from 0. The names are the released LLaDA tokenizer's.
CONTROL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
)
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) and give it LLaDA's control tokens.

    Args:
        texts: what to learn merges from.
        vocab_size: most ids, control tokens and the 256 bytes included; fewer when the texts give fewer merges.

    Returns:
        a fast tokenizer whose bos, eos, pad and mask tokens are set; padding is EOS, as in the released one.

    Raises:
        DataError: a vocabulary too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _BYTES + len(CONTROL_TOKENS):
        raise DataError(f"vocab_size: {vocab_size} is below the {_BYTES + len(CONTROL_TOKENS)} of bytes and controls")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start, end, *_, mask = CONTROL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end, mask_token=mask
    )
