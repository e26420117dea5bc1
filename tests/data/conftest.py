"""Small real tokenizers in the released checkpoints' style: byte-level, with the control tokens of each family."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROLS = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def byte_level(merges: list[tuple[str, str]], controls: list[str], **named: str) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    merges = [("Ċ", "Ċ"), ("l", "l"), ("Ġ", "4")]
    controls = [*CONTROLS, "<|mdm_mask|>"]
    return byte_level(merges, controls, bos_token="<|startoftext|>", eos_token="<|endoftext|>")


@pytest.fixture
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    controls = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|image|>"]
    merges = [("Ċ", "Ċ"), ("t", "h"), ("Ġ", "4")]
    return byte_level(merges, controls, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
