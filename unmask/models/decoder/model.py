"""One transformer for the masked diffusion models that grew out of Qwen2, Qwen3 and LLaMA, with attention both ways.

Module names follow the released checkpoints: `model.{embed_tokens,layers.N.*,norm}.weight`, `lm_head.weight`.

Shapes: B rows, L positions, D hidden size, H query heads, G key/value heads, E head size, V vocabulary rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.errors import ModelError
from unmask.models.decoder.config import DecoderConfig
from unmask.models.layers import (
    Cache,
    Kernel,
    LayerCache,
    Mask,
    RMSNorm,
    angle_tables,
    attend,
    boolean_mask,
    prepare_mask,
    rotate,
)
from unmask.ops.head import Head, compute_dtype
from unmask.ops.rows import take_rows


class Attention(nn.Module):
    """Attention of grouped heads with rotary positions; queries and keys may be normed a head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, kv_width = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, normed_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """Return the mixed values, (B, L, D); `cos` and `sin` from `angle_tables`, `mask` from `prepare_mask`."""
        v_BGLE = self._heads(self.v_proj(normed_BLD), None)
        q_BHLE = rotate(self._heads(self.q_proj(normed_BLD), self.q_norm), cos, sin, v_BGLE.dtype)
        k_BGLE = rotate(self._heads(self.k_proj(normed_BLD), self.k_norm), cos, sin, v_BGLE.dtype)
        if cache is not None:
            k_BGLE, v_BGLE = cache.update(k_BGLE, v_BGLE)
        return self.o_proj(attend(q_BHLE, k_BGLE, v_BGLE, mask).transpose(1, 2).flatten(2))

    def _heads(self, projected_BLD: Tensor, norm: RMSNorm | None) -> Tensor:
        heads_BLHE = projected_BLD.unflatten(-1, (-1, self.head_dim))
        return (heads_BLHE if norm is None else norm(heads_BLHE)).transpose(1, 2)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, normed_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        return self.down_proj(F.silu(self.gate_proj(normed_BLD)) * self.up_proj(normed_BLD))


class Layer(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, hidden_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None
    ) -> Tensor:
        """Return the layer's output, (B, L, D); arguments as in `Attention`."""
        compute = compute_dtype(hidden_BLD)
        hidden_BLD = hidden_BLD + self.self_attn(self.input_layernorm(hidden_BLD, compute), cos, sin, mask, cache)
        return hidden_BLD + self.mlp(self.post_attention_layernorm(hidden_BLD, compute))


class Trunk(nn.Module):
    """The module `model` of a checkpoint: embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.attention_kernel: Kernel = "sdpa"
        # Left uninitialised: drawing on the meta device would import PyTorch's compiler. `initialise` draws.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.rows, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._turns_E: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return final hidden states (B, L, D), normed, as the released network does: not shifted."""
        rows, length = input_ids.shape
        if length > self.config.max_position_embeddings:
            raise ModelError(
                f"input of {length} tokens is longer than the model's max_position_embeddings "
                f"{self.config.max_position_embeddings}; shorten the prompt, seq_length or max_new_tokens"
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        cos, sin = angle_tables(position_ids, self._turns(input_ids.device), self.config.rotary_scale)
        mask = boolean_mask(attention_mask)
        if mask is not None:
            mask = prepare_mask(mask, self.attention_kernel, rows, length, mask.shape[-1])
        hidden_BLD = self.embed_tokens(input_ids)
        for number, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BLD = checkpoint(layer, hidden_BLD, cos, sin, mask, use_reentrant=False)
            else:
                hidden_BLD = layer(hidden_BLD, cos, sin, mask, None if cache is None else cache.layer(number))
        return self.norm(hidden_BLD, hidden_BLD.dtype)

    def _turns(self, device: torch.device) -> Tensor:
        """Return the inverse frequencies on a device, copied there once: a CUDA graph cannot record such a copy."""
        if self._turns_E is None or self._turns_E.device != device:
            self._turns_E = torch.tensor(self.config.inverse_frequencies, dtype=torch.float32, device=device)
        return self._turns_E


class Decoder(nn.Module):
    """The whole network: `forward` returns hidden states, `logits` applies the head to those that need it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.rows, bias=False)

    @property
    def head(self) -> Head:
        """The output head, for losses and samplers that never build the logits; the embedding itself when tied."""
        return Head(self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the network.

        Args:
            input_ids: int64 (B, L), L at most `config.max_position_embeddings`.
            attention_mask: None, (B, L) or (B, 1, L, L); bool or 0/1, 1 = attend.
            position_ids: int64 (B, L) or (1, L); default counts from 0 over the padded row. Attention depends on
                differences of positions alone.
            cache: keys and values of further positions, which the mask's last dimension then covers too; no gradients,
                and only without shift: the hidden state that predicts a token may lie outside the pass.

        Returns:
            hidden states (B, L, D), of which [:, i] predicts the token at i: with shift the output at the place before
            (`place_before`).
        """
        if cache is not None and self.config.shift:
            raise ModelError("a network that predicts the next place's token takes no cache; run full forwards")
        hidden_BLD = self.model(input_ids, attention_mask, position_ids, cache)
        if not self.config.shift:
            return hidden_BLD
        before_BL = place_before(attention_mask, *input_ids.shape, device=input_ids.device)
        rows_B = torch.arange(len(before_BL), device=input_ids.device)[:, None] * before_BL.shape[1]
        return take_rows(hidden_BLD.flatten(0, 1), (before_BL + rows_B).flatten()).view_as(hidden_BLD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D), nothing banned."""
        return self.head.logits(hidden)


def place_before(attention_mask: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """Return for each place the one whose output predicts its token, int64 (B, L).

    It is the nearest attended place before it in the row; under a mask of four dimensions, such as that of several
    documents in a row, the place just before it, if it sees that. A place without one is predicted by its own output.
    """
    places_BL = torch.arange(length, device=device).expand(rows, -1)
    before_BL = places_BL - 1
    if attention_mask is not None and attention_mask.dim() == 2:
        attended_BL = torch.where(attention_mask.bool(), places_BL, -1).cummax(dim=1).values
        before_BL = F.pad(attended_BL[:, :-1], (1, 0), value=-1)
    elif attention_mask is not None:
        sees_BL = F.pad(attention_mask[:, 0].bool().expand(-1, length, length).diagonal(-1, 1, 2), (1, 0), value=False)
        before_BL = torch.where(sees_BL, before_BL, -1)
    return torch.where(before_BL < 0, places_BL, before_BL)


@torch.no_grad()
def initialise(model: Decoder, generator: torch.Generator) -> None:
    """Draw fresh weights as transformers does: normal of std `initializer_range`, biases 0, norms 1."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=model.config.initializer_range, generator=generator)
