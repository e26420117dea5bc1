"""DiffusionGemma's record in the table of families."""

from __future__ import annotations

from unmask.models.diffusion_gemma.config import DiffusionGemmaConfig, parse_config
from unmask.models.family import ControlTokens, Family, FileLayout, LoraTargets, SamplerDefaults, ShardPlan

_STACK, _ENCODER = "model.decoder.", "model.encoder.language_model."
# What the released file holds beside the text network; it belongs to images and is passed through unread.
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


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
        layer = 8 * width * residual + (3 * width + 3 * q + 2 * kv + mlp) * compute
        whole += layer
        largest = max(largest, layer)
        if checkpointing:
            whole += width * residual + kv * compute - layer
    return (tokens + tokens // 4) * (whole + (largest if checkpointing else 0))


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
