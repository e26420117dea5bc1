"""DiffusionGemma's row in the table of families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmask.models.diffusion_gemma.config import DiffusionGemmaConfig, parse_config
from unmask.models.family import Family, FileLayout

if TYPE_CHECKING:
    import torch
    from torch import nn

_STACK, _ENCODER = "model.decoder.", "model.encoder.language_model."
# What the released file holds beside the text network; it belongs to images and is carried through unread.
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def _build(config: DiffusionGemmaConfig) -> nn.Module:
    from unmask.models.diffusion_gemma.model import DiffusionGemma

    return DiffusionGemma(config)


def _initialise(model: Any, generator: torch.Generator) -> None:
    from unmask.models.diffusion_gemma.model import initialise

    initialise(model, generator)


def carried(key: str) -> bool:
    """Say whether a stored tensor belongs to the vision part, which text training leaves as it is."""
    return key.startswith(_VISION)


def twin(key: str) -> str | None:
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
    kept, whole = 0, 0
    for kind in config.layer_types:
        kv_heads, dim = config.heads(kind)
        kv = 2 * kv_heads * dim
        q = config.num_attention_heads * dim
        mlp = 4 * config.intermediate_size + top * (4 * config.moe_intermediate_size + 2 * width)
        layer = 8 * width * residual + (3 * width + 3 * q + 2 * kv + mlp) * compute
        whole += layer
        kept = max(kept, layer)
        if checkpointing:
            whole += width * residual + kv * compute - layer
    return (tokens + tokens // 4) * (whole + (kept if checkpointing else 0))


FAMILY = Family(
    model_type="diffusion_gemma",
    provides=frozenset({"encoder_cache", "self_conditioning"}),
    architecture="DiffusionGemmaForBlockDiffusion",
    parse_config=parse_config,
    build=_build,
    initialise=_initialise,
    activation_bytes=activation_bytes,
    layout=FileLayout(carried, twin),
)
