"""config.json of the families on the decoder trunk for transformers' AutoConfig. Light: no network is loaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from unmask.models.decoder.families import ON_THE_TRUNK


def _init(self: Any, **values: Any) -> None:
    """Keep the released fields as they are; RoPE's become one dictionary, `rope_parameters`."""
    values.setdefault("tie_word_embeddings", False)
    self.rope_parameters = values.pop("rope_parameters", None)
    self.max_position_embeddings = values.get("max_position_embeddings")  # which RoPE's fields may refer to
    PreTrainedConfig.__init__(self, **values)


# model_type → its class: AutoConfig asks for one each. transformers writes an `__init__` for a class without one.
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    family.model_type: type(
        f"{family.name.replace('-', '')}HFConfig",
        (PreTrainedConfig,),
        {"model_type": family.model_type, "__module__": __name__, "__init__": _init},
    )
    for family in ON_THE_TRUNK
}


def register_config() -> None:
    """Register every family's config.json with AutoConfig, which is all that AutoTokenizer asks for; repeatable."""
    for model_type, config_class in CONFIGS.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
