"""LLaDA: one bidirectional transformer over text with [MASK] tokens (Nie et al. 2025, arXiv 2502.09992).

Module names follow the released checkpoints, so a state dict has their keys as it stands:
`model.transformer.{wte,blocks.N.*,ln_f,ff_out}.weight`. `ff_out` names a block's down projection and the head alike.

Shapes: B rows, L positions, D d_model, H query heads, G key/value heads, E head size, V embedding rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.errors import ModelError
from unmask.models.attention import Kernel, attend, prepare_mask
from unmask.models.layers import Linear, RMSNorm, embedding, for_matmuls, rotary_tables, rotate
from unmask.models.llada.cache import KeyValueStore, Window
from unmask.models.llada.config import LLaDAConfig
from unmask.ops.head import Head

if TYPE_CHECKING:
    from unmask.models.attention import Mask

# (keys, values) of some positions → (keys, values) of all that they attend to, each (B, G, ·, E).
Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Pre-norm attention and a gated MLP, `silu(ff_proj(x)) · up_proj(x)`."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, kv_width = config.d_model, config.kv_heads * config.head_dim
        bias, qkv_bias = config.include_bias, config.include_bias or config.include_qkv_bias
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = Linear(width, width, bias=qkv_bias)
        self.k_proj = Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = Linear(width, kv_width, bias=qkv_bias)
        self.attn_out = Linear(width, width, bias=bias)
        self.ff_proj = Linear(width, config.hidden_size, bias=bias)
        self.up_proj = Linear(width, config.hidden_size, bias=bias)
        self.ff_out = Linear(config.hidden_size, width, bias=bias)

    def forward(
        self,
        hidden_BLD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        exchange: Exchange | None = None,
    ) -> Tensor:
        """Return the block's output, (B, L, D).

        Args:
            hidden_BLD: its input.
            cos, sin: from `rotary_tables`.
            mask: from `prepare_mask`.
            exchange: None, or what keeps this layer's keys and values: given those of the L positions, it returns
                those to attend to.
        """
        hidden_BLD = hidden_BLD + self.attention(for_matmuls(self.attn_norm(hidden_BLD)), cos, sin, mask, exchange)
        normed_BLD = for_matmuls(self.ff_norm(hidden_BLD))
        return hidden_BLD + self.ff_out(F.silu(self.ff_proj(normed_BLD)) * self.up_proj(normed_BLD))

    def attention(
        self,
        normed_BLD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        exchange: Exchange | None = None,
    ) -> Tensor:
        """Bidirectional attention with rotary positions."""
        q_BHLE = rotate(self._heads(self.q_proj(normed_BLD)), cos, sin)
        k_BGLE = rotate(self._heads(self.k_proj(normed_BLD)), cos, sin)
        v_BGLE = self._heads(self.v_proj(normed_BLD))
        if exchange is not None:
            k_BGLE, v_BGLE = exchange(k_BGLE, v_BGLE)
        return self.attn_out(attend(q_BHLE, k_BGLE, v_BGLE, mask).transpose(1, 2).flatten(2))

    def _heads(self, projected_BLD: Tensor) -> Tensor:
        return projected_BLD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Transformer(nn.Module):
    """The network below `model.transformer`: embedding, blocks, final norm and (unless tied) the head."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.attention_kernel: Kernel = "sdpa"
        self.wte = embedding(config.rows, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = Linear(config.d_model, config.rows, bias=config.include_bias)

    @property
    def head(self) -> Head:
        """The output head; its matrix is the embedding when tied."""
        scale = 1 / math.sqrt(self.config.d_model) if self.config.scale_logits else 1.0
        if self.config.weight_tying:
            return Head(self.wte.weight, scale=scale)
        return Head(self.ff_out.weight, self.ff_out.bias, scale=scale)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return final hidden states (B, L, D), normed. Arguments as in `LLaDA.forward`."""
        length = input_ids.shape[1]
        if length > self.config.max_sequence_length:
            raise ModelError(
                f"input of {length} tokens is longer than the model's max_sequence_length "
                f"{self.config.max_sequence_length}; shorten the prompt, seq_length or max_new_tokens"
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        mask = prepare_mask(attention_mask_4d(attention_mask), self.attention_kernel, *input_ids.shape)
        hidden_BLD = self.embed(input_ids)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BLD = checkpoint(block, hidden_BLD, cos, sin, mask, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                hidden_BLD = block(hidden_BLD, cos, sin, mask)
        return self.ln_f(hidden_BLD)

    def forward_window(self, input_ids: Tensor, window: Window) -> Tensor:
        """Return final hidden states (K, S, D) of a window, normed. Arguments as in `LLaDA.forward_window`."""
        cos, sin = rotary_tables(window.positions_KS, self.config.head_dim, self.config.rope_theta)
        hidden_KSD = self.embed(input_ids)
        for layer, block in enumerate(self.blocks):
            hidden_KSD = block(hidden_KSD, cos, sin, window.mask, partial(window.exchange, layer))
        return self.ln_f(hidden_KSD)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return what the first block sees of tokens (..., L): (..., L, D)."""
        hidden = self.wte(input_ids)
        return hidden * math.sqrt(self.config.d_model) if self.config.input_emb_norm else hidden


def attention_mask_4d(mask: Tensor | None) -> Tensor | None:
    """Bring a mask to bool and a shape that broadcasts to (B, H, L, L).

    Args:
        mask: None (every position attends to all, which keeps SDPA's flash kernel possible), (B, L) for padding or
            (B, 1, L, L) for packing; bool or 0/1, 1 = attend.

    Raises:
        ModelError: another shape, or a 4-D mask of floats, which elsewhere means numbers added to the scores.
    """
    if mask is None:
        return None
    if mask.dim() == 4 and mask.is_floating_point():
        raise ModelError("attention_mask of four dimensions must be bool or 0/1 integers (1 = attend), not floats")
    if mask.dim() == 4:
        return mask.bool()
    if mask.dim() != 2:
        raise ModelError(f"attention_mask has shape {tuple(mask.shape)}; give (B, L) or (B, 1, L, L)")
    keep_BL = mask.bool()
    # A row of padding alone would have no key to attend to; such rows see themselves, and nothing looks at them.
    empty_B = ~keep_BL.any(dim=1)
    return (keep_BL | empty_B[:, None])[:, None, None, :]


class LLaDA(nn.Module):
    """The network as this package uses it: hidden states first, logits only where somebody asks for them."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": Transformer(config)})

    @property
    def transformer(self) -> Transformer:
        """The layers; reached through a ModuleDict so that state-dict keys equal the released ones."""
        return self.model["transformer"]  # pyright: ignore[reportReturnType]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run the network.

        Args:
            input_ids: int64 (B, L), L at most `config.max_sequence_length`.
            attention_mask: None, (B, L) or (B, 1, L, L); bool or 0/1, 1 = attend.
            position_ids: int64 (B, L) or (1, L); default counts from 0 over the padded row, as the released code does.

        Returns:
            final hidden states (B, L, D).
        """
        return self.transformer(input_ids, attention_mask, position_ids)

    def new_store(self, rows: int, length: int) -> KeyValueStore:
        """Return an empty store for `forward_window`: B `rows` of at most `length` positions."""
        config = self.config
        return KeyValueStore.zeros(
            config.n_layers, (rows, config.kv_heads, length, config.head_dim), like=self.transformer.wte.weight
        )

    @torch.no_grad()
    def forward_window(self, input_ids: Tensor, window: Window) -> Tensor:
        """Run the network over a window of positions alone, all others as the window's store has them.

        A window of all positions is `forward`, and fills the store. With any other the result is an approximation,
        unless the store's keys and values are those of the very tokens that now stand at the other positions.

        Args:
            input_ids: int64 (K, S), the tokens of each row's window, right-padded to the widest.
            window: where they stand; its store is written in place. Positions count from 0 and a row's are its columns.

        Returns:
            final hidden states (K, S, D); behind a row's own window they mean nothing.
        """
        return self.transformer.forward_window(input_ids, window)

    @property
    def head(self) -> Head:
        """The output head, for losses and samplers that never build the logits."""
        return self.transformer.head

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D): all `embedding_size` rows, nothing banned."""
        return self.head.logits(hidden)

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (hidden, matrix, bias) whose linear map is `logits`; `head` replaces it."""
        return self.head.scaled(hidden), self.head.weight, self.head.bias


@torch.no_grad()
def initialise(model: LLaDA, generator: torch.Generator) -> None:
    """Draw fresh weights as OLMo's `init_fn` does (allenai/OLMo, olmo/initialization.py).

    `mitchell`: normal of 1/√d_model cut at three deviations, the projections back into the residual stream smaller by
    √(2·(layer+1)) and by their own fan-in. `normal`: one deviation for all, cut at `init_cutoff_factor` of them.
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

    wide = config.d_model**-0.5
    draw(model.transformer.wte.weight, wide)
    for layer, block in enumerate(model.transformer.blocks):
        assert isinstance(block, Block)
        for inner in (block.q_proj, block.k_proj, block.v_proj, block.ff_proj, block.up_proj):
            draw(inner.weight, wide)
        for outer in (block.attn_out, block.ff_out):
            draw(outer.weight, (2 * outer.in_features * (layer + 1)) ** -0.5)
    if not config.weight_tying:
        draw(model.transformer.ff_out.weight, wide)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("norm.weight") or name.endswith("ln_f.weight"):
            parameter.fill_(1.0)
