"""LLaDA's row in the table of families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmask.models.family import Family
from unmask.models.llada.config import LLaDAConfig, parse_config

if TYPE_CHECKING:
    import torch
    from torch import nn


def _build(config: LLaDAConfig) -> nn.Module:
    from unmask.models.llada.model import LLaDA

    return LLaDA(config)


def _initialise(model: Any, generator: torch.Generator) -> None:
    from unmask.models.llada.model import initialise

    initialise(model, generator)


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


FAMILY = Family(
    model_type="llada",
    provides=frozenset({"mask_token"}),
    architecture="LLaDAModelLM",
    parse_config=parse_config,
    build=_build,
    initialise=_initialise,
    activation_bytes=activation_bytes,
)
