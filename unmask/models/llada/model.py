"""LLaDA: one bidirectional transformer over text with [MASK] tokens (Nie et al. 2025, arXiv 2502.09992).

Module names follow the released checkpoints, so a state dict has their keys as it stands:
`model.transformer.{wte,blocks.N.*,ln_f,ff_out}.weight`. `ff_out` names a block's down projection and the head alike.

Shapes: B rows, L positions, D d_model, H query heads, G key/value heads, E head size, V embedding rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.errors import ModelError
from unmask.models.layers import (
    Cache,
    Kernel,
    LayerCache,
    Mask,
    RMSNorm,
    attend,
    boolean_mask,
    prepare_mask,
    rotary_tables,
    rotate,
)
from unmask.models.llada.config import LLaDAConfig
from unmask.ops.head import Head, compute_dtype


class Block(nn.Module):
    """Pre-norm attention and a gated MLP, `silu(ff_proj(x)) · up_proj(x)`."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, kv_width = config.d_model, config.kv_heads * config.head_dim
        bias, qkv_bias = config.include_bias, config.include_bias or config.include_qkv_bias
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=bias)
        self.ff_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.up_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.ff_out = nn.Linear(config.hidden_size, width, bias=bias)

    def forward(
        self, hidden_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None
    ) -> Tensor:
        """Return the block's output, (B, L, D); `cos` and `sin` from `rotary_tables`, `mask` from `prepare_mask`."""
        compute = compute_dtype(hidden_BLD)
        hidden_BLD = hidden_BLD + self.attention(self.attn_norm(hidden_BLD, compute), cos, sin, mask, cache)
        normed_BLD = self.ff_norm(hidden_BLD, compute)
        return hidden_BLD + self.ff_out(F.silu(self.ff_proj(normed_BLD)) * self.up_proj(normed_BLD))

    def attention(self, normed_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """Return bidirectional attention with rotary positions, (B, L, D)."""
        q_BHLE = rotate(self._heads(self.q_proj(normed_BLD)), cos, sin)
        k_BGLE = rotate(self._heads(self.k_proj(normed_BLD)), cos, sin)
        v_BGLE = self._heads(self.v_proj(normed_BLD))
        if cache is not None:
            k_BGLE, v_BGLE = cache.update(k_BGLE, v_BGLE)
        return self.attn_out(attend(q_BHLE, k_BGLE, v_BGLE, mask).transpose(1, 2).flatten(2))

    def _heads(self, projected_BLD: Tensor) -> Tensor:
        return projected_BLD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Transformer(nn.Module):
    """The module `model.transformer` of a checkpoint: embedding, blocks, final norm and (unless tied) the head."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.attention_kernel: Kernel = "sdpa"
        # Left uninitialised: drawing on the meta device would import PyTorch's compiler. `initialise` draws.
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.rows, config.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, config.rows, bias=config.include_bias)

    @property
    def head(self) -> Head:
        """The output head; its matrix is the embedding when tied."""
        scale = 1 / math.sqrt(self.config.d_model) if self.config.scale_logits else 1.0
        if self.config.weight_tying:
            return Head(self.wte.weight, scale=scale)
        return Head(self.ff_out.weight, self.ff_out.bias, scale=scale)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return final hidden states (B, L, D), normed. Arguments as in `LLaDA.forward`."""
        rows, length = input_ids.shape
        if length > self.config.max_sequence_length:
            raise ModelError(
                f"input of {length} tokens is longer than the model's max_sequence_length "
                f"{self.config.max_sequence_length}; shorten the prompt, seq_length or max_new_tokens"
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        mask = boolean_mask(attention_mask)
        if mask is not None:
            mask = prepare_mask(mask, self.attention_kernel, rows, length, mask.shape[-1])
        hidden_BLD = self.wte(input_ids)
        if self.config.input_emb_norm:
            hidden_BLD = hidden_BLD * math.sqrt(self.config.d_model)
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BLD = checkpoint(block, hidden_BLD, cos, sin, mask, use_reentrant=False)
            else:
                hidden_BLD = block(hidden_BLD, cos, sin, mask, None if cache is None else cache.layer(number))
        return self.ln_f(hidden_BLD, hidden_BLD.dtype)


class LLaDA(nn.Module):
    """The whole network: `forward` returns hidden states, `logits` applies the head to those that need it."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": Transformer(config)})

    @property
    def transformer(self) -> Transformer:
        """The layers, in a ModuleDict so that state-dict keys equal the released ones."""
        return self.model["transformer"]  # pyright: ignore[reportReturnType]

    @property
    def head(self) -> Head:
        """The output head, for losses and samplers that never build the logits."""
        return self.transformer.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the network.

        Args:
            input_ids: int64 (B, L), L at most `config.max_sequence_length`.
            attention_mask: None, (B, L) or (B, 1, L, L); bool or 0/1, 1 = attend.
            position_ids: int64 (B, L) or (1, L); default counts from 0 over the padded row, as the released code does.
            cache: keys and values of further positions, which the mask's last dimension then covers too; no gradients.

        Returns:
            final hidden states (B, L, D).
        """
        return self.transformer(input_ids, attention_mask, position_ids, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D): all `embedding_size` rows, nothing banned."""
        return self.head.logits(hidden)


@torch.no_grad()
def initialise(model: LLaDA, generator: torch.Generator) -> None:
    """Draw fresh weights as OLMo's `init_fn` does (allenai/OLMo, olmo/initialization.py).

    `mitchell`: normal of std 1/√d_model truncated at 3 std; projections back into the residual stream have std
    1/√(2·fan_in·(layer+1)). `normal`: std `init_std` for all, truncated at `init_cutoff_factor` std.
    """
    config = model.config

    def draw(weight: Tensor, std: float) -> None:
        cutoff = 3.0
        if config.init_fn == "normal":
            std, cutoff = config.init_std, config.init_cutoff_factor
        if cutoff is None:
            nn.init.normal_(weight, std=std, generator=generator)
        else:
            nn.init.trunc_normal_(weight, std=std, a=-cutoff * std, b=cutoff * std, generator=generator)

    std = config.d_model**-0.5
    draw(model.transformer.wte.weight, std)
    for layer, block in enumerate(model.transformer.blocks):
        assert isinstance(block, Block)
        for inner in (block.q_proj, block.k_proj, block.v_proj, block.ff_proj, block.up_proj):
            draw(inner.weight, std)
        for outer in (block.attn_out, block.ff_out):
            draw(outer.weight, (2 * outer.in_features * (layer + 1)) ** -0.5)
    if not config.weight_tying:
        draw(model.transformer.ff_out.weight, std)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("norm.weight") or name.endswith("ln_f.weight"):
            parameter.fill_(1.0)
