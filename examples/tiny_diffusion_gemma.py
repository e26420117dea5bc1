"""Make a small random DiffusionGemma checkpoint with a tokenizer of its own, to try everything on a laptop:

    python examples/tiny_diffusion_gemma.py gsm8k_chat_train.jsonl tiny_gemma

It is written by transformers' own class, in the layout of google/diffusiongemma-26B-A4B-it, vision tower included.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from unmask.config.data import DatasetConfig
from unmask.data.sources import open_rows
from unmask.data.template_source import read_template
from unmask.errors import UnmaskError
from unmask.models.diffusion_gemma.family import FAMILY
from unmask.models.tokenizer import train_tokenizer

TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1,
    "sliding_window": 128, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 1024,
}  # fmt: skip
VISION = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64,
}  # fmt: skip
GENERATION = {
    "max_denoising_steps": 48, "max_new_tokens": 128, "t_min": 0.4, "t_max": 0.8, "confidence_threshold": 0.005,
    "stability_threshold": 1, "pad_token_id": 0,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
}  # fmt: skip


def make(source: str, output: str, vocab_size: int = 2048, canvas_length: int = 64, seed: int = 0) -> int:
    """Write the checkpoint; return its number of parameters."""
    rows = open_rows(DatasetConfig(source))
    texts = (message.content for index in range(len(rows)) for message in rows[index].messages)
    assert FAMILY.control_tokens is not None
    tokenizer = train_tokenizer(texts, vocab_size, FAMILY.control_tokens)
    tokenizer.chat_template = read_template("diffusion_gemma")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<turn|>")]
    config = DiffusionGemmaConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "eos_token_id": ends[0]},
        vision_config=VISION,
        canvas_length=canvas_length,
        eos_token_id=ends,  # pyright: ignore[reportCallIssue]
        boi_token_id=0,
        eoi_token_id=0,
        image_token_id=0,
    )
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(config)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    generation = json.dumps({**GENERATION, "eos_token_id": ends}, indent=1)
    (Path(output) / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
    return sum(parameter.numel() for parameter in model.model.decoder.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="chat rows that the tokenizer is trained on, for example gsm8k_chat_train.jsonl")
    parser.add_argument("output", help="folder to write")
    given = parser.parse_args()
    try:
        size = make(given.source, given.output)
    except UnmaskError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {given.output}: {size / 1e6:.1f} M parameters")
