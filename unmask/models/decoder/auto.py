"""The families on the decoder trunk for transformers' Auto classes, so that other people's tools load them.

As in the released classes, output i of a shifted family predicts token i + 1, and who samples with it shifts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from unmask.errors import ModelError
from unmask.models.decoder.auto_config import CONFIGS, register_config
from unmask.models.decoder.families import ON_THE_TRUNK
from unmask.models.decoder.model import RMSNorm, Trunk
from unmask.models.registry import FAMILIES, resolve

_REMEDIES = {
    "labels": ": its loss depends on how tokens were masked; train with `unmask train` or compute it from .logits",
    "inputs_embeds": "; give input_ids",
    "past_key_values": ": attention is bidirectional and keeps no cache; sample with `unmask generate`",
}


class DecoderModelLM(PreTrainedModel):
    """A thin PreTrainedModel around the native trunk; its forward returns logits for every position, not shifted."""

    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # transformers builds networks on the meta device, where frequencies have no values
            parsed = resolve(FAMILIES[config.model_type]).parse_config(config.to_dict(), "config.json")
        self.model = Trunk(parsed)
        self.lm_head = None if parsed.tie_word_embeddings else nn.Linear(parsed.hidden_size, parsed.rows, bias=False)
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
                raise ModelError(f"this model's forward does not take {name}{_REMEDIES.get(name, '; leave it out')}")
        if input_ids is None:
            raise ModelError("this model's forward needs input_ids")
        hidden_BLD = self.model(input_ids, attention_mask, position_ids)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return MaskedLMOutput(
            logits=nn.functional.linear(hidden_BLD, head.weight)  # pyright: ignore[reportCallIssue]
        )

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, or None when the embedding serves as head."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.model.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)  # pyright: ignore[reportArgumentType]


# model_type → its class, under the name that checkpoints carry.
MODELS: dict[str, type[DecoderModelLM]] = {
    family.model_type: type(
        family.architectures[0],
        (DecoderModelLM,),
        {"config_class": CONFIGS[family.model_type], "__module__": __name__},
    )
    for family in ON_THE_TRUNK
}


def register() -> None:
    """Register every family with AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM; repeatable."""
    register_config()
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        for model_type, model_class in MODELS.items():
            auto.register(CONFIGS[model_type], model_class, exist_ok=True)
