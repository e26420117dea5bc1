"""LLaDA's config.json as a frozen dataclass: every field is honoured, known to be harmless, or refused by name.

Field names and meanings follow the OLMo-style configuration of ML-GSAI/LLaDA's released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from unmask.errors import ModelError
from unmask.models.pretrained_config import check_fields

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
    for name in ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length", "kv_heads", "hidden_size"):
        if getattr(config, name) < 1:
            raise ModelError(f"{where}: {name} must be at least 1, got {getattr(config, name)}")
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
