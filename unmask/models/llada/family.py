"""LLaDA's `Family` record: attention, noise, LoRA targets, sampler defaults, special tokens."""

from __future__ import annotations

from unmask.models.family import ControlTokens, Family, FileLayout, LoraTargets, SamplerDefaults, ShardPlan
from unmask.models.llada.config import LLaDAConfig, parse_config


def activation_bytes(config: LLaDAConfig, tokens: int, residual: int, compute: int, checkpointing: bool) -> int:
    """Count what autograd keeps: per block the residual stream, norms, q, k, v, the attention output and the MLP.

    Each block keeps two residual states and two normed copies in the residual's dtype, and q, k, v, the mixed heads,
    two matmul inputs and four MLP tensors in the matmul's. With checkpointing a block keeps its input alone, and
    one block at a time the rest.
    """
    width, hidden = config.d_model, config.hidden_size
    kv = config.kv_heads * config.head_dim
    inputs = tokens * width * residual
    block = tokens * (4 * width * residual + (4 * width + 2 * kv + 4 * hidden) * compute)
    if checkpointing:
        return config.n_layers * inputs + block
    return config.n_layers * block


def tied_to(key: str) -> str | None:
    """Return the key whose weights a stored tensor repeats in a network with a tied head; None for any other."""
    return "model.transformer.wte.weight" if key == "model.transformer.ff_out.weight" else None


FAMILY = Family(
    name="LLaDA",
    model_type="llada",
    architectures=("LLaDAModelLM",),
    noise="mask",
    attention="bidirectional",
    parse_config=parse_config,
    network="unmask.models.llada.model:LLaDA",
    initialise="unmask.models.llada.model:initialise",
    activation_bytes=activation_bytes,
    lora=LoraTargets(
        linears=("model.transformer.blocks.*",),
        default=("model.transformer.blocks.*",),
        whole=("*norm", "model.transformer.ln_f", "model.transformer.wte", "model.transformer.ff_out"),
        frozen={
            "transformer.ff_out": "the head is read as a matrix by the loss; peft.modules_to_save can train it whole",
            "wte": "the embedding is a lookup; peft.modules_to_save can train it whole",
        },
    ),
    shard=ShardPlan("model.transformer.blocks"),
    sampler=SamplerDefaults(  # Nie et al. 2025, appendix A.3; ML-GSAI/LLaDA, generate.py
        values={
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
        },
        presets={
            "reference": {},
            "balanced": {"threshold": 0.9, "cache": "prefix"},
            "fast": {"threshold": 0.9, "cache": "dual"},
        },
        window_cache=True,
    ),
    files=FileLayout(tied_to=tied_to),
    chat_template="llada",
    control_tokens=ControlTokens(
        ("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"),
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mdm_mask|>",
        },
    ),
    auto_config="unmask.models.llada.auto_config:register_config",
    auto="unmask.models.llada.auto:register",
)
