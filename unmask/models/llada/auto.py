"""LLaDA for transformers' Auto classes, so that other people's tools load it without remote code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from unmask.models.llada.config import parse_config
from unmask.models.llada.model import RMSNorm, Transformer


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


class LLaDAModelLM(PreTrainedModel):
    """A thin PreTrainedModel around the native network; its forward returns logits for every position."""

    config_class = LLaDAHFConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = False

    def __init__(self, config: LLaDAHFConfig) -> None:
        super().__init__(config)
        self.model = nn.ModuleDict({"transformer": Transformer(parse_config(config.to_dict(), "config.json"))})
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        """Return `.logits` (B, L, V); arguments as in the native network, generation-only keywords are ignored."""
        transformer = self.model["transformer"]
        hidden_BLD = transformer(input_ids, attention_mask, position_ids)
        return MaskedLMOutput(logits=transformer.logits(hidden_BLD))  # pyright: ignore[reportCallIssue]

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model["transformer"].wte  # pyright: ignore[reportReturnType]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model["transformer"].wte = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, or None when the embedding serves as head."""
        return getattr(self.model["transformer"], "ff_out", None)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


def register() -> None:
    """Register LLaDA with AutoConfig, AutoModel, AutoModelForCausalLM and AutoModelForMaskedLM; calling it again is free."""
    AutoConfig.register("llada", LLaDAHFConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        auto.register(LLaDAHFConfig, LLaDAModelLM, exist_ok=True)
