"""LLaDA's `Family` record: how its config.json is read, attention, noise, LoRA targets, sampler defaults, tokens.

Every field of config.json is honoured, known to be harmless, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from unmask.errors import ModelError
from unmask.models.family import ControlTokens, Family, FileLayout, LoraTargets, SamplerDefaults, ShardPlan
from unmask.models.llada.config import LLaDAConfig
from unmask.models.pretrained_config import check_fields, check_size

# Values that this network implements; anything else in a config.json would need other code.
_ONLY = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_dropout": (0.0,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "embedding_dropout": (0.0,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "residual_dropout": (0.0,),
    "rope": (True,),
    "rope_full_precision": (True,),
}

# Fields of released files that cannot change a result: settings of features that are refused above.
_HARMLESS = ("alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "init_device", "precision")


def parse_config(values: Mapping[str, Any], where: str) -> LLaDAConfig:
    """Read the keys of a config.json, or of a run's inline `model.config`; `where` is what messages call it.

    Raises:
        ModelError: a key that is not known, a value that this network does not implement, or sizes that do not fit.
    """
    known = {field.name: field for field in fields(LLaDAConfig)}
    check_fields(values, [*known, *_HARMLESS], _ONLY, "LLaDA", where)
    given = {name: values[name] for name in known if name in values}
    for name, value in given.items():
        _check_type(name, value, str(known[name].type), where)
    config = LLaDAConfig(**given)
    if config.include_bias and values.get("bias_for_layer_norm") is None:
        # In the released code a norm without a setting of its own follows include_bias.
        raise ModelError(
            f"{where}: include_bias=True would give the norms biases, which are not supported; "
            "add bias_for_layer_norm=False"
        )
    if config.tie_word_embeddings and "weight_tying" in values:
        config = replace(config, tie_word_embeddings=None)
    _check_sizes(config, where)
    _check_ids(config, where)
    return config


def _check_type(name: str, value: Any, annotation: str, where: str) -> None:
    if value is None and "None" in annotation:
        return
    expected = {"int": int, "float": (int, float), "bool": bool, "str": str}[annotation.split(" ")[0]]
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ModelError(f"{where}: {name} should be {annotation.split(' ')[0]}, got {value!r}")


def _check_sizes(config: LLaDAConfig, where: str) -> None:
    sizes = "d_model n_heads n_layers vocab_size embedding_size max_sequence_length kv_heads hidden_size"
    for name in sizes.split():
        check_size(config.rows if name == "embedding_size" else getattr(config, name), name, where)
    if config.d_model % config.n_heads or config.head_dim % 2:
        raise ModelError(
            f"{where}: d_model={config.d_model} must split into n_heads={config.n_heads} heads of even size"
        )
    for name in ("rope_theta", "rms_norm_eps", "init_std", "init_cutoff_factor"):
        value = getattr(config, name)
        if value is not None and not (0 < value < math.inf):
            raise ModelError(f"{where}: {name} must be a positive number, got {value}")
    if config.multi_query_attention is not None and config.n_kv_heads is not None:
        meant = 1 if config.multi_query_attention else config.n_heads
        if config.n_kv_heads != meant:
            raise ModelError(
                f"{where}: multi_query_attention={config.multi_query_attention} contradicts n_kv_heads="
                f"{config.n_kv_heads}; leave multi_query_attention out"
            )
    if config.n_heads % config.kv_heads:
        raise ModelError(f"{where}: n_heads={config.n_heads} must be a multiple of n_kv_heads={config.kv_heads}")
    if config.rows < config.vocab_size:
        raise ModelError(f"{where}: embedding_size={config.rows} is below vocab_size={config.vocab_size}")
    if config.init_fn not in ("mitchell", "normal"):
        raise ModelError(f"{where}: init_fn={config.init_fn!r} is not supported; use 'mitchell' or 'normal'")
    if config.tie_word_embeddings not in (None, config.weight_tying):
        raise ModelError(
            f"{where}: tie_word_embeddings={config.tie_word_embeddings} contradicts weight_tying="
            f"{config.weight_tying}; leave tie_word_embeddings out"
        )


def _check_ids(config: LLaDAConfig, where: str) -> None:
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if not 0 <= value < config.rows:
            raise ModelError(
                f"{where}: {name}={value} is outside the vocabulary of {config.rows}; "
                "set it to an id between 0 and embedding_size - 1"
            )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(config, name) == config.mask_token_id:
            raise ModelError(
                f"{where}: mask_token_id={config.mask_token_id} is also the {name}; corruption could not be "
                "distinguished from text, so set mask_token_id to an id of its own"
            )


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
    attention_layers=lambda config: [(config.d_model, None)] * config.n_layers,
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
