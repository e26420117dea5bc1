"""Reads config.json of the families on the decoder trunk; a `Variant` is what a family's type alone says.

Every field of config.json is honoured, known to be harmless, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from unmask.errors import ModelError, choice_problem
from unmask.models.decoder.config import DecoderConfig
from unmask.models.family import Family, FileLayout, LoraTargets, SamplerDefaults, ShardPlan
from unmask.models.pretrained_config import check_fields, check_size
from unmask.models.registry import resolve


@dataclass(frozen=True)
class Variant:
    """What the files of one family have in common.

    Attributes:
        name: as people write it.
        model_type: the value of config.json's `model_type`.
        architecture: the class that a config.json names.
        layout: the autoregressive family that it grew out of: `qwen2` (biases on q, k and v), `qwen3` (norms on the
            heads' queries and keys) or `llama`.
        shift: as in `DecoderConfig`.
        says_attention: whether config.json has to say `attention`, since released files do not tell.
    """

    name: str
    model_type: str
    architecture: str
    layout: str
    shift: int = 0
    says_attention: bool = False


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_OTHERS = (
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "rope_theta",
    "rope_scaling", "rope_parameters", "layer_types", "mask_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Values that this network implements; anything else in a config.json would need other code.
_ONLY = {
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_sliding_window": (False, None),
}
_HARMLESS = ("max_window_layers", "sliding_window")  # settings of windows, which are refused above
# Kind of RoPE → its fields and, of these, those that a file may leave out.
_ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def parse_config(variant: Variant, values: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read the keys of a config.json, or of a run's inline `model.config`; `where` is what messages call it.

    Raises:
        ModelError: a key that is not known, a value that this network does not implement, or sizes that do not fit.
    """
    biased = ("attention_bias",) if variant.layout != "qwen2" else ()
    attention = ("attention",) if variant.says_attention else ()
    check_fields(values, [*_SIZES, *_OTHERS, *_HARMLESS, *biased, *attention], _ONLY, variant.name, where)
    if attention:
        _check_attention(variant, values, where)
    if missing := [name for name in _SIZES if values.get(name) is None]:
        raise ModelError(f"{where}: {', '.join(missing)}: missing; {variant.name}'s config.json says each")
    heads = values["num_attention_heads"]
    sizes = {name: values[name] for name in _SIZES}
    sizes["num_key_value_heads"] = _given(values, "num_key_value_heads", heads)
    for name, value in sizes.items():
        check_size(_integer(value, name, where), name, where)
    even = sizes["hidden_size"] // heads
    sizes["head_dim"] = _integer(
        _given(values, "head_dim", 128 if variant.layout == "qwen3" else even), "head_dim", where
    )
    check_size(sizes["head_dim"], "head_dim", where)
    if heads % sizes["num_key_value_heads"]:
        raise ModelError(
            f"{where}: num_attention_heads={heads} must be a multiple of num_key_value_heads="
            f"{sizes['num_key_value_heads']}"
        )
    if sizes["head_dim"] % 2 or (values.get("head_dim") is None and sizes["hidden_size"] % heads):
        raise ModelError(
            f"{where}: heads must have an even size, got head_dim={sizes['head_dim']} (hidden_size="
            f"{sizes['hidden_size']}, num_attention_heads={heads})"
        )
    layer_types = values.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * sizes["num_hidden_layers"]:
        raise ModelError(
            f"{where}: layer_types must be 'full_attention' for each of {sizes['num_hidden_layers']} layers; layers "
            "with a window are not supported"
        )
    frequencies, scale = _rotary(values, sizes, where)
    bias = _flag(values, "attention_bias", where)
    mask, ends, pad = _ids(values, sizes["vocab_size"], where)
    return DecoderConfig(
        family=variant.model_type,
        rms_norm_eps=_positive(_given(values, "rms_norm_eps", 1e-6), "rms_norm_eps", where),
        tie_word_embeddings=_flag(values, "tie_word_embeddings", where),
        qkv_bias=variant.layout == "qwen2" or bias,
        output_bias=bias,
        qk_norm=variant.layout == "qwen3",
        shift=variant.shift,
        inverse_frequencies=frequencies,
        rotary_scale=scale,
        initializer_range=_positive(_given(values, "initializer_range", 0.02), "initializer_range", where),
        mask_token_id=mask,
        eos_token_ids=ends,
        pad_token_id=pad,
        **sizes,
    )


def _given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else value


def _integer(value: Any, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"{where}: {name} should be int, got {value!r}")
    return value


def _positive(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"{where}: {name} must be a positive number, got {value!r}")
    return float(value)


def _flag(values: Mapping[str, Any], name: str, where: str) -> bool:
    value = _given(values, name, False)
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {name} should be bool, got {value!r}")
    return value


def _check_attention(variant: Variant, values: Mapping[str, Any], where: str) -> None:
    attention = values.get("attention")
    if attention is None:
        raise ModelError(
            f"{where}: {variant.name} models are trained with attention both ways (dllm's mdlm) or block-causal "
            '(bd3lm), and released files do not say which; for an mdlm model add "attention": "bidirectional" to '
            "config.json"
        )
    if attention == "block_causal":
        raise ModelError(f"{where}: attention='block_causal' is not supported yet, 'bidirectional' is")
    if attention != "bidirectional":
        raise ModelError(f"{where}: attention {choice_problem(attention, ('bidirectional',))}")


def _ids(values: Mapping[str, Any], rows: int, where: str) -> tuple[int, tuple[int, ...], int]:
    """Return the ids of the mask, of all tokens that end a text, and of padding (by default the first of these)."""
    mask, end = values.get("mask_token_id"), values.get("eos_token_id")
    ends: tuple[Any, ...] = tuple(end) if isinstance(end, list) else (end,)
    for name, value in (("mask_token_id", mask), ("eos_token_id", ends[0] if ends else None)):
        if value is None:
            raise ModelError(f"{where}: {name} is missing; add the id that the tokenizer has for it")
    pad = _given(values, "pad_token_id", ends[0])
    for name, value in (("mask_token_id", mask), *(("eos_token_id", end) for end in ends), ("pad_token_id", pad)):
        if not 0 <= _integer(value, name, where) < rows:
            raise ModelError(f"{where}: {name}={value} is outside the vocabulary of {rows}; set an id below vocab_size")
    for name, others in (("eos_token_id", ends), ("pad_token_id", (pad,))):
        if mask in others:
            raise ModelError(
                f"{where}: mask_token_id={mask} is also the {name}; corruption could not be distinguished from text, "
                "so set mask_token_id to an id of its own"
            )
    return _integer(mask, "mask_token_id", where), ends, pad


def _rotary(values: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> tuple[tuple[float, ...], float]:
    """Return inverse frequencies and the factor of cosines and sines, as transformers computes them for the kind.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`.
    """
    given: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = _given(values, name, {})
        if not isinstance(value, Mapping):
            raise ModelError(f"{where}: {name} should be a mapping, got {value!r}")
        given |= value
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in _ROPE:
        raise ModelError(f"{where}: rope_type {choice_problem(kind, _ROPE)}")
    theta = _positive(given.pop("rope_theta", None) or _given(values, "rope_theta", 10000.0), "rope_theta", where)
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    needed, optional = _ROPE[kind]
    given = {name: value for name, value in given.items() if value is not None}
    if "original_max_position_embeddings" in needed:
        given.setdefault("original_max_position_embeddings", sizes["max_position_embeddings"])
    if unknown := sorted(given.keys() - {*needed, *optional}):
        raise ModelError(f"{where}: RoPE of rope_type {kind!r} has no field {', '.join(map(repr, unknown))}")
    if absent := [name for name in needed if name not in given]:
        raise ModelError(f"{where}: RoPE of rope_type {kind!r} needs {', '.join(absent)}")
    for name, value in given.items():
        if name == "truncate":
            _flag(given, name, where)
        else:
            _positive(value, name, where)
    size = sizes["head_dim"]
    if kind == "default":
        return tuple(theta ** (-pair / size) for pair in range(0, size, 2)), 1.0
    asked = SimpleNamespace(
        standardize_rope_params=lambda: None, rope_parameters={"rope_theta": theta, "rope_type": kind, **given}, **sizes
    )
    try:
        frequencies, scale = resolve("transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS")[kind](asked)
    except (ArithmeticError, ValueError) as error:
        raise ModelError(
            f"{where}: RoPE of rope_type {kind!r} cannot be computed: {error}; correct its fields"
        ) from None
    turns = tuple(frequencies.tolist())
    if not all(map(math.isfinite, (*turns, scale))):
        raise ModelError(
            f"{where}: RoPE of rope_type {kind!r} gives frequencies that are no numbers; correct its fields"
        )
    return turns, float(scale)


def activation_bytes(config: DecoderConfig, tokens: int, residual: int, compute: int, checkpointing: bool) -> int:
    """Count what autograd keeps: per layer the residual stream, norms, q, k, v, the attention output and the MLP.

    Each layer keeps two residual states and two normed copies in the residual's dtype, and q, k, v, the mixed heads,
    two matmul inputs and four MLP tensors in the matmul's; with norms of the heads q and k twice. With checkpointing
    a layer keeps its input alone, and one layer at a time the rest.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
    inputs = tokens * width * residual
    normed = heads + kv if config.qk_norm else 0
    layer = tokens * (4 * width * residual + (2 * width + 2 * heads + 2 * kv + normed + 4 * hidden) * compute)
    if checkpointing:
        return config.num_hidden_layers * inputs + layer
    return config.num_hidden_layers * layer


def record(variant: Variant, sampler: SamplerDefaults) -> Family:
    """Return the family of a variant: all on the trunk share network, LoRA targets, sharding and files."""
    return Family(
        name=variant.name,
        model_type=variant.model_type,
        architectures=(variant.architecture,),
        noise="mask",
        attention="bidirectional",
        parse_config=lambda values, where: parse_config(variant, values, where),
        network="unmask.models.decoder.model:Decoder",
        initialise="unmask.models.decoder.model:initialise",
        activation_bytes=activation_bytes,
        attention_layers=lambda config: [(config.num_attention_heads * config.head_dim, None)] * config.n_layers,
        lora=LoraTargets(
            linears=("model.layers.*",),
            default=("model.layers.*",),
            whole=("*norm", "model.embed_tokens", "lm_head"),
            frozen={
                "lm_head": "the head is read as a matrix by the loss; peft.modules_to_save can train it whole",
                "embed_tokens": "the embedding is a lookup; peft.modules_to_save can train it whole",
            },
        ),
        shard=ShardPlan("model.layers"),
        sampler=sampler,
        files=FileLayout(tied_to=lambda key: "model.embed_tokens.weight" if key == "lm_head.weight" else None),
        auto_config="unmask.models.decoder.auto_config:register_config",
        auto="unmask.models.decoder.auto:register",
    )
