"""The made-up family's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from made_up_family.config import MadeUpConfig
from unmask.errors import ModelError
from unmask.models.family import ControlTokens, Family, LoraTargets, SamplerDefaults, ShardPlan
from unmask.models.pretrained_config import check_fields


def parse_config(values: Mapping[str, Any], where: str) -> MadeUpConfig:
    """Read the keys of a config.json; ModelError for one that is missing or not known."""
    names = {field.name for field in fields(MadeUpConfig)}
    check_fields(values, names, {}, "made-up", where)
    if missing := sorted(names - values.keys()):
        raise ModelError(f"{where}: {', '.join(missing)}: missing")
    return MadeUpConfig(**{name: values[name] for name in names})


def activation_bytes(config: MadeUpConfig, tokens: int, residual: int, compute: int, checkpointing: bool) -> int:
    """Count what autograd keeps: about eight tensors of the width a layer."""
    return config.layers * tokens * config.width * 8 * residual


FAMILY = Family(
    name="MadeUp",
    model_type="made_up",
    architectures=("MadeUpForDiffusion",),
    noise="mask",
    attention="bidirectional",
    parse_config=parse_config,
    network="made_up_family.model:MadeUp",
    initialise="made_up_family.model:initialise",
    activation_bytes=activation_bytes,
    attention_layers=lambda config: [(config.width, None)] * config.layers,
    lora=LoraTargets(linears=("layers.*",), default=("layers.*.qkv",), frozen={"out": "the head stays as it is"}),
    shard=ShardPlan("layers"),
    sampler=SamplerDefaults(
        values={
            "steps": 8,
            "max_new_tokens": 16,
            "block_size": 16,
            "temperature": 0.0,
            "remasking": "low_confidence",
            "cfg_scale": 0.0,
            "eos": "allow",
            "cache": "none",
            "revise": "none",
            "revise_threshold": 0.9,
        },
        presets={"reference": {}, "balanced": {"threshold": 0.95}, "fast": {"threshold": 0.8}},
    ),
    chat_template="llada",
    control_tokens=ControlTokens(
        ("<eos>", "<mask>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"eos_token": "<eos>", "pad_token": "<eos>", "mask_token": "<mask>"},
    ),
)
