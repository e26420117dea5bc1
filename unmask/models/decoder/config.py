"""The decoder trunk's configuration as a frozen dataclass; `variant.parse_config` reads it from a config.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderConfig:
    """What defines a network on the Qwen2, Qwen3 or LLaMA layout; names as in config.json where it has them.

    Attributes:
        family: key of its family in the registry.
        head_dim: size of one head; the heads together may be wider or narrower than `hidden_size`.
        max_position_embeddings: positions the model was trained for; longer inputs are refused.
        qkv_bias: biases on the query, key and value projections.
        output_bias: a bias on attention's output projection.
        qk_norm: an RMS norm on each head's queries and keys, before they turn.
        shift: the hidden state at a place predicts the token there (0) or at the place behind it (1).
        inverse_frequencies: angle by which each pair of a head turns from one position to the next, in radians.
        rotary_scale: factor of the rotary cosines and sines (YaRN's attention factor).
        initializer_range: standard deviation of a fresh network's weights.
        eos_token_ids: all tokens that end a text; the first is `eos_token_id`.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    shift: int
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float
    initializer_range: float
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.vocab_size

    @property
    def max_sequence_length(self) -> int:
        """Positions of the longest input."""
        return self.max_position_embeddings

    @property
    def n_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.num_hidden_layers

    @property
    def kv_heads(self) -> int:
        """Key and value heads of each layer."""
        return self.num_key_value_heads

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text."""
        return self.eos_token_ids[0]
