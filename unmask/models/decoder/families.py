"""The families on the decoder trunk, as data: what their types say, and how they sample by default."""

from __future__ import annotations

from unmask.models.decoder.variant import Variant, record
from unmask.models.family import SamplerDefaults

_VALUES = {
    "steps": 128,
    "max_new_tokens": 128,
    "block_size": 32,
    "temperature": 0.0,
    "remasking": "low_confidence",
    "cfg_scale": 0.0,
    "eos": "allow",
    "cache": "none",
    "revise": "none",
    "revise_threshold": 0.9,
}

# No preset `reference`: the published samplers of these families are not there.

# Grown out of Qwen2.5 by next-token prediction under masks (Ye et al. 2025, arXiv 2508.15487); DiffuCoder and
# Dream-Coder have its network and its type. Position i predicts token i + 1.
DREAM = record(
    Variant("Dream", "Dream", "DreamModel", "qwen2", shift=1),
    SamplerDefaults(
        values={**_VALUES, "block_size": 128, "remasking": "entropy"},
        presets={
            "balanced": {"threshold": 0.95, "remasking": "low_confidence"},
            "fast": {"threshold": 0.9, "remasking": "low_confidence"},
        },
    ),
)

# dllm's conversions of autoregressive checkpoints ("a2d"). Position i predicts token i.
_A2D = SamplerDefaults(
    values=_VALUES,
    presets={
        "balanced": {"threshold": 0.9, "cache": "prefix"},
        "fast": {"threshold": 0.9, "cache": "dual"},
    },
    window_cache=True,
)
A2D_LLAMA = record(Variant("A2D-LLaMA", "a2d-llama", "A2DLlamaLMHeadModel", "llama", says_attention=True), _A2D)
A2D_QWEN2 = record(Variant("A2D-Qwen2", "a2d-qwen2", "A2DQwen2LMHeadModel", "qwen2", says_attention=True), _A2D)
A2D_QWEN3 = record(Variant("A2D-Qwen3", "a2d-qwen3", "A2DQwen3LMHeadModel", "qwen3", says_attention=True), _A2D)

ON_THE_TRUNK = (DREAM, A2D_LLAMA, A2D_QWEN2, A2D_QWEN3)
