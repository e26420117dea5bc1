"""LLaDA for transformers' Auto classes, so that other people's tools load it without remote code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from unmask.errors import ModelError
from unmask.models.llada.auto_config import LLaDAHFConfig, register_config
from unmask.models.llada.family import parse_config
from unmask.models.llada.model import RMSNorm, Transformer

_REMEDIES = {
    "labels": ": its loss depends on how tokens were masked; train with `unmask train` or compute it from .logits",
    "inputs_embeds": "; give input_ids",
    "past_key_values": ": attention is bidirectional and keeps no cache; sample with `unmask generate`",
}


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
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> MaskedLMOutput:
        """Return `.logits` (B, L, V); arguments as in the native network.

        Raises:
            ModelError: another argument that asks for something (not None, False or a default of transformers).
        """
        for name, value in others.items():
            if value is not None and value is not False and name not in ("use_cache", "return_dict", "cache_position"):
                raise ModelError(f"LLaDA's forward does not take {name}{_REMEDIES.get(name, '; leave it out')}")
        if input_ids is None:
            raise ModelError("LLaDA's forward needs input_ids")
        transformer: Any = self.model["transformer"]
        hidden_BLD = transformer(input_ids, attention_mask, position_ids)
        return MaskedLMOutput(logits=transformer.head.logits(hidden_BLD))  # pyright: ignore[reportCallIssue]

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
            nn.init.ones_(module.weight)  # pyright: ignore[reportArgumentType]


def register() -> None:
    """Register LLaDA with AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM; repeatable."""
    register_config()
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        auto.register(LLaDAHFConfig, LLaDAModelLM, exist_ok=True)
