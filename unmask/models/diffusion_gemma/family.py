"""DiffusionGemma's `Family` record: how its config.json is read, noise, attention, LoRA targets, sampler defaults.

Each field of config.json is honoured, known to be harmless, or refused. Only the text part is read; the vision part's
values stay in the file as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unmask.errors import ModelError
from unmask.models.diffusion_gemma.config import FULL, SLIDING, DiffusionGemmaConfig
from unmask.models.family import ControlTokens, Family, FileLayout, LoraTargets, SamplerDefaults, ShardPlan
from unmask.models.pretrained_config import check_fields, check_size

_STACK, _ENCODER = "model.decoder.", "model.encoder.language_model."
# What the released file holds beside the text network; it belongs to images and is passed through unread.
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_PATTERN = 6  # without layer_types every sixth layer is a full one
_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}

# Values that this network implements, at the top and in text_config; anything else would need other code.
_ONLY = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": ("vision", None),
}
_NUMBERS = {  # text_config's sizes, with transformers' defaults; None = must be given
    "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
    "sliding_window": 512, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
}  # fmt: skip
_TEXT = (
    *_NUMBERS, "layer_types", "rope_parameters", "rms_norm_eps", "final_logit_softcapping", "pad_token_id",
    "eos_token_id", "global_head_dim", "num_global_key_value_heads", "per_layer_config", "initializer_range",
)  # fmt: skip
_TOP = (
    "text_config vision_config canvas_length eos_token_id pad_token_id boi_token_id eoi_token_id image_token_id "
    "initializer_range vision_soft_tokens_per_image"
).split()


def parse_config(values: Mapping[str, Any], where: str) -> DiffusionGemmaConfig:
    """Read the keys of a config.json, or of a run's inline `model.config`; `where` is what messages call it.

    Raises:
        ModelError: a key that is not known, a value that this network does not implement, or sizes that do not fit.
    """
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError(f"{where}: text_config is missing; a DiffusionGemma config.json has its sizes there")
    text_fields = {f"text_config.{name}": value for name, value in text.items()}
    known = [*_TOP, *(f"text_config.{name}" for name in _TEXT)]
    only = _ONLY | {f"text_config.{name}": allowed for name, allowed in _ONLY.items()}
    check_fields({**values, **text_fields}, known, only, "DiffusionGemma", where)
    numbers = {name: _positive(text.get(name, default), name, where) for name, default in _NUMBERS.items()}
    layer_types = _layer_types(text.get("layer_types"), numbers.pop("num_hidden_layers"), where)
    full_heads, full_dim = _full_heads(text, layer_types, numbers, where)
    rope = {layer_type: _rope(text.get("rope_parameters"), layer_type, where) for layer_type in _ROPE}
    canvas = values.get("canvas_length")
    eos = text.get("eos_token_id", 1)
    ends = eos if values.get("eos_token_id") is None else values["eos_token_id"]
    fill: Any = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    pad = text.get("pad_token_id", 0)
    config = DiffusionGemmaConfig(
        **numbers,
        layer_types=layer_types,
        full_num_key_value_heads=full_heads,
        full_head_dim=full_dim,
        sliding_rope_theta=rope[SLIDING][0],
        full_rope_theta=rope[FULL][0],
        full_rotary_factor=rope[FULL][1],
        rms_norm_eps=_number(text.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        final_logit_softcapping=_number(text.get("final_logit_softcapping", 30.0), "final_logit_softcapping", where),
        canvas_length=_positive(256 if canvas is None else canvas, "canvas_length", where),
        eos_token_id=fill,
        eos_token_ids=tuple(ends) if isinstance(ends, (list, tuple)) else (ends,),
        pad_token_id=0 if pad is None else pad,
        initializer_range=_number(text.get("initializer_range", 0.02), "initializer_range", where),
    )
    _check_fit(config, where)
    return config


def _positive(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {name} must be an integer of at least 1, got {value!r}")
    check_size(value, name, where)
    return value


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"{where}: {name} must be a positive number, got {value!r}")
    return float(value)


def _layer_types(given: Any, layers: int, where: str) -> tuple[str, ...]:
    if given is None:
        given = [SLIDING if (number + 1) % _PATTERN else FULL for number in range(layers - 1)] + [FULL]
    known = isinstance(given, (list, tuple)) and all(layer_type in (SLIDING, FULL) for layer_type in given)
    if not known or len(given) != layers:
        raise ModelError(f"{where}: layer_types must name {layers} layers, each {SLIDING} or {FULL}, got {given!r}")
    if given[-1] != FULL:
        raise ModelError(f"{where}: layer_types: the last layer must be {FULL}, got {given[-1]}")
    return tuple(given)


def _full_heads(
    text: Mapping[str, Any], layer_types: tuple[str, ...], numbers: Mapping[str, int], where: str
) -> tuple[int, int]:
    """Return key/value heads and head size of full layers, from either spelling that transformers writes."""
    per_layer = text.get("per_layer_config")
    if per_layer is None:
        heads = text.get("num_global_key_value_heads")
        heads = numbers["num_key_value_heads"] if heads is None else heads
        dim = text.get("global_head_dim", 512)
    else:
        overrides = _by_layer(per_layer, where)
        full = [number for number, layer_type in enumerate(layer_types) if layer_type == FULL]
        values = [overrides.get(number, {}) for number in full]
        if set(overrides) - set(full) or any(value != values[0] for value in values):
            raise ModelError(
                f"{where}: per_layer_config is not supported unless all full layers, and no others, share it"
            )
        odd = set(values[0]) - {"head_dim", "num_key_value_heads"}
        if odd:
            raise ModelError(f"{where}: per_layer_config: {min(odd)!r} is not supported; head sizes only")
        heads = values[0].get("num_key_value_heads", numbers["num_key_value_heads"])
        dim = values[0].get("head_dim", numbers["head_dim"])
    return _positive(heads, "num_global_key_value_heads", where), _positive(dim, "global_head_dim", where)


def _by_layer(given: Any, where: str) -> dict[int, dict[str, Any]]:
    try:
        return {int(key): dict(value) for key, value in dict(given).items()}
    except (TypeError, ValueError):
        raise ModelError(f"{where}: per_layer_config must map layer numbers to fields, got {given!r}") from None


def _rope(given: Any, layer_type: str, where: str) -> tuple[float, float]:
    """Return (theta, share of pairs that turn) of a type of layer."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not isinstance(given.get(layer_type, {}), Mapping):
        raise ModelError(f"{where}: rope_parameters must map {SLIDING} and {FULL} to their fields, got {given!r}")
    values = dict(given.get(layer_type, _ROPE[layer_type]))
    odd = set(values) - {"rope_type", "rope_theta", "partial_rotary_factor"}
    if odd or values.get("rope_type", "default") != _ROPE[layer_type]["rope_type"]:
        refused = min(odd) if odd else values.get("rope_type")
        raise ModelError(
            f"{where}: rope_parameters of {layer_type}: {refused!r} is not supported; this network "
            f"implements rope_type {_ROPE[layer_type]['rope_type']!r} with rope_theta"
        )
    factor = _number(values.get("partial_rotary_factor", 1.0), "partial_rotary_factor", where)
    if factor > 1.0:
        raise ModelError(f"{where}: partial_rotary_factor must be at most 1, got {factor}")
    if layer_type == SLIDING and factor != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor={factor} of {layer_type} is not supported; leave it out")
    return _number(values.get("rope_theta"), "rope_theta", where), factor


def _check_fit(config: DiffusionGemmaConfig, where: str) -> None:
    for layer_type in (SLIDING, FULL):
        heads, dim = config.heads(layer_type)
        if config.num_attention_heads % heads or dim % 2:
            raise ModelError(
                f"{where}: {layer_type}: num_attention_heads={config.num_attention_heads} must be a multiple of the "
                f"{heads} key/value heads, and the head size {dim} even"
            )
    if config.top_k_experts > config.num_experts:
        raise ModelError(f"{where}: top_k_experts={config.top_k_experts} is more than num_experts={config.num_experts}")
    for name, ids in (
        ("eos_token_id", (config.eos_token_id, *config.eos_token_ids)),
        ("pad_token_id", (config.pad_token_id,)),
    ):
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise ModelError(
                    f"{where}: {name}={token!r} is outside the vocabulary of {config.vocab_size}; set it to an id "
                    "between 0 and vocab_size - 1"
                )
    if config.eos_token_id not in config.eos_token_ids:
        raise ModelError(
            f"{where}: text_config.eos_token_id={config.eos_token_id}, which fills an answer's last canvas, is none of "
            f"eos_token_id={list(config.eos_token_ids)}, at which generation stops; make it one of them"
        )


def passthrough(key: str) -> bool:
    """Say whether a stored tensor belongs to the vision part, which text training leaves as it is."""
    return key.startswith(_VISION)


def tied_to(key: str) -> str | None:
    """Return the key that a stored tensor is tied to, for files that write tied weights twice; None when it is not.

    The encoder's text layers and the head are the decoder's, but for the layer scalars.
    """
    if key == "lm_head.weight":
        return _STACK + "embed_tokens.weight"
    if key.startswith(_ENCODER) and not key.endswith(".layer_scalar"):
        return _STACK + key.removeprefix(_ENCODER)
    return None


def activation_bytes(
    config: DiffusionGemmaConfig, tokens: int, residual: int, compute: int, checkpointing: bool
) -> int:
    """Count what autograd keeps: of every layer the residual stream, norms, attention, the dense MLP and the experts.

    The stack runs over the tokens once as encoder and over a canvas once as decoder; the latter is counted as one more
    token in four, the share of a canvas of 256 in a row of 1024. With checkpointing a layer keeps its input, its keys
    and its values, and one layer at a time the rest.
    """
    width, top = config.hidden_size, config.top_k_experts
    largest, whole = 0, 0
    for layer_type in config.layer_types:
        kv_heads, dim = config.heads(layer_type)
        kv = 2 * kv_heads * dim
        q = config.num_attention_heads * dim
        mlp = 4 * config.intermediate_size + top * (4 * config.moe_intermediate_size + 2 * width)
        layer = 8 * width * residual + (3 * width + 5 * q + kv + mlp) * compute
        whole += layer
        largest = max(largest, layer)
        if checkpointing:
            whole += width * residual + kv * compute - layer
    return (tokens + tokens // 4) * (whole + (largest if checkpointing else 0))


def attention_layers(config: DiffusionGemmaConfig) -> list[tuple[int, int | None]]:
    """Return the width of each layer's queries, all heads together, and its window."""
    return [
        (config.num_attention_heads * config.heads(kind)[1], config.sliding_window if kind == SLIDING else None)
        for kind in config.layer_types
    ]


FAMILY = Family(
    name="DiffusionGemma",
    model_type="diffusion_gemma",
    architectures=("DiffusionGemmaForBlockDiffusion",),
    noise="uniform",
    attention="canvas",
    parse_config=parse_config,
    network="unmask.models.diffusion_gemma.model:DiffusionGemma",
    initialise="unmask.models.diffusion_gemma.model:initialise",
    activation_bytes=activation_bytes,
    attention_layers=attention_layers,
    lora=LoraTargets(
        linears=(
            "model.decoder.layers.*.self_attn.*",
            "model.decoder.layers.*.mlp.*",
            "model.decoder.self_conditioning.*",
        ),
        default=("model.decoder.layers.*.self_attn.*", "model.decoder.layers.*.mlp.*"),
        whole=("*norm", "*layernorm*"),
        frozen={
            "router": "the router stays frozen, or the choice of experts would drift",
            "experts": "experts are stacked matrices; name them in peft.target_parameters",
            "embed_tokens": "the embedding is also the head and the self-conditioning signal",
            "lm_head": "the head is the embedding, which stays frozen",
            "vision": "the vision tower takes no part in training on text",
        },
        aliases=((f"{_STACK}layers.", f"{_ENCODER}layers."), (f"{_STACK}norm", f"{_ENCODER}norm")),
    ),
    # A step runs the encoder, the self-conditioning pass (where it has one, without gradient) and the decoder.
    shard=ShardPlan(
        "model.decoder.layers",
        methods=("encode", "decode"),
        experts="experts",
        over_tokens="encode",
        forward_passes=3,
        backward_passes=2,
    ),
    sampler=SamplerDefaults(  # transformers, generation_diffusion_gemma.py
        values={
            "steps": 48,
            "max_new_tokens": 256,
            "eos": "allow",
            "entropy_bound": 0.1,
            "t_min": 0.4,
            "t_max": 0.8,
            "stability_threshold": 1,
            "confidence_threshold": 0.005,
            "cache": "block",
            "revise": "redraw",
        },
        presets={
            "reference": {},
            "balanced": {"steps": 24, "confidence_threshold": 0.01},
            "fast": {"steps": 16, "confidence_threshold": 0.02},
        },
        from_config={"block_size": "canvas_length"},
        from_generation={
            "max_denoising_steps": "steps",
            "max_new_tokens": "max_new_tokens",
            "t_min": "t_min",
            "t_max": "t_max",
            "stability_threshold": "stability_threshold",
            "confidence_threshold": "confidence_threshold",
            "sampler_config.entropy_bound": "entropy_bound",
        },
    ),
    files=FileLayout(passthrough, tied_to, "vision tower"),
    chat_template="diffusion_gemma",
    control_tokens=ControlTokens(
        ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
)
