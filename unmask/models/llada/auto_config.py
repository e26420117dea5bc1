"""LLaDA's config.json for transformers' AutoConfig. Light: the network and PreTrainedModel stay unloaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class LLaDAHFConfig(PreTrainedConfig):
    """config.json as transformers wants it: the released fields kept as they are."""

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(self, **values: Any) -> None:
        values.setdefault("tie_word_embeddings", values.get("weight_tying", False))
        super().__init__(**values)


def register_config() -> None:
    """Register LLaDA's config.json with AutoConfig, which is all that AutoTokenizer asks for; repeatable."""
    AutoConfig.register("llada", LLaDAHFConfig, exist_ok=True)
