"""LLaDA's configuration as a frozen dataclass, with config.json's names; `family.parse_config` reads the file.

Field names and meanings follow the OLMo-style configuration of ML-GSAI/LLaDA's released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LLaDAConfig:
    """What defines a LLaDA network; fields are named as in config.json, and their defaults are the released 8B's.

    Attributes:
        n_kv_heads: key and value heads (GQA); None = `n_heads`.
        mlp_hidden_size: width of the gated MLP; None = `mlp_ratio * d_model`.
        vocab_size: ids that text can have.
        embedding_size: rows of the embedding and the head, at least `vocab_size`; None = `vocab_size`.
        max_sequence_length: positions the model was trained for; longer inputs are refused.
        weight_tying: the head is the embedding.
        tie_word_embeddings: transformers' name for `weight_tying`, which decides where both are given: transformers 4
            dumps `true` whatever the network does.
        include_bias: biases on every linear layer; norms have none, so the file must say `bias_for_layer_norm: false`.
        include_qkv_bias: biases on the query, key and value projections.
        scale_logits: logits are divided by √d_model.
        input_emb_norm: embeddings are multiplied by √d_model.
        init_fn: how a fresh model is drawn, `mitchell` or `normal`, with `init_std` and `init_cutoff_factor` for
            `normal`: draws beyond that many deviations are redrawn; None = none are.
        mask_token_id, eos_token_id, pad_token_id: ids with a meaning to corruption and sampling.
    """

    family: ClassVar[str] = "llada"

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    tie_word_embeddings: bool | None = None
    include_bias: bool = False
    include_qkv_bias: bool = False
    scale_logits: bool = False
    input_emb_norm: bool = False
    multi_query_attention: bool | None = None
    init_fn: str = "mitchell"
    init_std: float = 0.02
    init_cutoff_factor: float | None = None
    mask_token_id: int = 126336
    eos_token_id: int = 126081
    pad_token_id: int = 126081

    @property
    def kv_heads(self) -> int:
        """Key and value heads after resolving None and `multi_query_attention`."""
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.d_model // self.n_heads

    @property
    def hidden_size(self) -> int:
        """Width of the gated MLP after resolving None."""
        return self.mlp_hidden_size if self.mlp_hidden_size is not None else self.mlp_ratio * self.d_model

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.embedding_size if self.embedding_size is not None else self.vocab_size
