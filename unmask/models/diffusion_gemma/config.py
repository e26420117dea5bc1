"""DiffusionGemma's configuration as a frozen dataclass; `family.parse_config` reads it of a config.json.

Names and defaults follow transformers `models/diffusion_gemma/configuration_diffusion_gemma.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class DiffusionGemmaConfig:
    """What defines the text part of a DiffusionGemma network; fields are named as in config.json.

    Attributes:
        layer_types: `sliding_attention` or `full_attention`, one a layer; the last is a full one.
        num_key_value_heads, head_dim: of sliding layers.
        sliding_window: W; a query of a sliding layer sees keys with q − k < W.
        full_rotary_factor: share of a full layer's rotary pairs that turn.
        max_position_embeddings: positions the model was made for; longer inputs are refused.
        final_logit_softcapping: c; logits are c · tanh(z / c).
        eos_token_id: fills the rest of an answer's last canvas.
        eos_token_ids: all ids that end an answer.
        pad_token_id: its embedding is never trained by lookups.
        initializer_range: standard deviation of a fresh model's weights.
    """

    family: ClassVar[str] = "diffusion_gemma"
    mask_token_id: ClassVar[None] = None  # noise is drawn from the vocabulary

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    full_num_key_value_heads: int
    full_head_dim: int
    sliding_window: int
    sliding_rope_theta: float
    full_rope_theta: float
    full_rotary_factor: float
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    canvas_length: int
    eos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    initializer_range: float

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.vocab_size

    @property
    def max_sequence_length(self) -> int:
        """The longest input, prompt and answer together."""
        return self.max_position_embeddings

    def heads(self, layer_type: str) -> tuple[int, int]:
        """Return (key and value heads, head size) of a kind of layer."""
        if layer_type == FULL:
            return self.full_num_key_value_heads, self.full_head_dim
        return self.num_key_value_heads, self.head_dim
