"""DiffusionGemma's text network: one stack of layers that encodes clean tokens causally and denoises a canvas.

As encoder the stack reads clean tokens from left to right and leaves its keys and values; as decoder it sees a canvas
in both directions, and the clean tokens before it through those. Both roles share every weight but the layer scalars;
the decoder alone has the self-conditioning MLP. Architecture: transformers `models/diffusion_gemma` and google-deepmind
`gemma` (`Gemma4_26B_A4B`).

Module names follow the released checkpoints, so a state dict has their keys as it stands: the stack is `model.decoder`,
and `model.encoder.language_model` holds the encoder's layer scalars alone.

Shapes: B rows, L positions, N tokens, K canvases, C canvas positions, S encoded columns, D width, H query heads, G
key/value heads, E head size (of the router: experts), T experts a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.errors import ModelError
from unmask.models.diffusion_gemma.config import FULL, SLIDING, DiffusionGemmaConfig
from unmask.models.experts import Dispatch, Experts, local_dispatch
from unmask.models.layers import Kernel, Mask, RMSNorm, attend, prepare_mask, rotary_tables, rotate
from unmask.ops.head import Head, compute_dtype
from unmask.ops.rows import take_rows

# Position of a padding column: after everything, so that neither causal attention nor a canvas ever sees it.
PADDING_POSITION = 2**40


@dataclass(frozen=True)
class Encoded:
    """The encoder's output for the decoder: keys and values of clean tokens (`cache.py` reads them from a store).

    Attributes:
        keys, values: one (B, G, S, E) a layer.
        hidden_BLD: final hidden states, normed, of the tokens encoded last.
        positions_BS: int64, position of each column; `PADDING_POSITION` at padding.
        lengths_B: int64, tokens of each row: the position where its next canvas starts.
        aligned: whether column s holds position s or padding in every row, so that position slices are column slices.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden_BLD: Tensor
    positions_BS: Tensor
    lengths_B: Tensor
    aligned: bool

    def detach(self) -> Encoded:
        """Return this with keys and values detached from the autograd graph; hidden states stay attached."""
        keys, values = (tuple(map(Tensor.detach, tensors)) for tensors in (self.keys, self.values))
        return replace(self, keys=keys, values=values)


@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs in one pass, the same for all layers of a type.

    Attributes:
        cos, sin: rotary tables at the queries' positions.
        mask: from `prepare_mask`; None = everything, or everything before when `causal`.
        causal: query i sees keys 0..i.
        columns: the encoded columns that come before the pass's own keys.
    """

    cos: Tensor
    sin: Tensor
    mask: Mask
    causal: bool
    columns: slice


def causal_mask(queries_BL: Tensor, keys_BS: Tensor, window: int | None) -> Tensor:
    """Return which keys each encoder query sees, bool (B or 1, 1, L, S); the queries are the last L of the keys.

    A query sees keys with q − k < `window`, None = all before it; at padding its position may be any.
    """
    # Comparing needs one byte a pair; an int64 difference would need eight.
    seen_BLS = keys_BS[:, None, :] <= queries_BL[:, :, None]
    if window is not None:
        seen_BLS &= keys_BS[:, None, :] > queries_BL[:, :, None] - window
    # A padding query sees itself, so that its softmax is not empty; its output is never used.
    seen_BLS.diagonal(keys_BS.shape[1] - queries_BL.shape[1], dim1=1, dim2=2).fill_(True)
    return seen_BLS[:, None]


def past_mask(positions_KS: Tensor, starts_K: Tensor, window: int | None) -> Tensor:
    """Return which clean columns the canvas that starts at `starts_K` sees, bool (K, S): those before it.

    In a sliding layer of window W these are the last W − 1, the same for all queries of the canvas.
    """
    distance_KS = starts_K[:, None] - positions_KS
    seen_KS = distance_KS > 0
    return seen_KS if window is None else seen_KS & (distance_KS < window)


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values; full layers use the key projection as values."""

    def __init__(self, config: DiffusionGemmaConfig, layer_type: str) -> None:
        super().__init__()
        kv_heads, self.head_dim = config.heads(layer_type)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False) if layer_type == SLIDING else None
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps)
        self.k_norm = RMSNorm(self.head_dim, eps)
        self.v_norm = RMSNorm(self.head_dim, eps, scale=False)

    def forward(
        self, normed_BLD: Tensor, inputs: AttentionInputs, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (output (B, L, D), own keys (B, G, L, E), own values); `past` keys and values come before them."""
        raw_BLGE = self._heads(self.k_proj(normed_BLD))
        values_BLGE = raw_BLGE if self.v_proj is None else self._heads(self.v_proj(normed_BLD))
        dtype, tables = raw_BLGE.dtype, (inputs.cos, inputs.sin)
        q_BHLE = rotate(self.q_norm(self._heads(self.q_proj(normed_BLD))).transpose(1, 2), *tables, dtype)
        k_BGLE = rotate(self.k_norm(raw_BLGE).transpose(1, 2), *tables, dtype)
        v_BGLE = self.v_norm(values_BLGE).transpose(1, 2)
        keys, values = k_BGLE, v_BGLE
        if past is not None:
            keys = torch.cat((past[0].to(k_BGLE.dtype), k_BGLE), dim=2)
            values = torch.cat((past[1].to(v_BGLE.dtype), v_BGLE), dim=2)
        mixed_BHLE = attend(q_BHLE, keys, values, inputs.mask, causal=inputs.causal, scale=1.0)
        return self.o_proj(mixed_BHLE.transpose(1, 2).flatten(2)), k_BGLE, v_BGLE

    def _heads(self, projected_BLD: Tensor) -> Tensor:
        return projected_BLD.unflatten(-1, (-1, self.head_dim))


def gelu(gate: Tensor) -> Tensor:
    """Return GELU in its tanh approximation, which gates every MLP here."""
    return F.gelu(gate, approximate="tanh")


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, normed_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        return self.down_proj(gelu(self.gate_proj(normed_BLD)) * self.up_proj(normed_BLD))


class SelfConditioning(nn.Module):
    """Adds what the previous pass predicted to a canvas's embeddings, through a gated MLP between two norms."""

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.pre_norm = RMSNorm(width, config.rms_norm_eps)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.post_norm = RMSNorm(width, config.rms_norm_eps, scale=False)

    def forward(self, embedded_KCD: Tensor, predicted_KCD: Tensor | None) -> Tensor:
        """Return post_norm(x + mlp(pre_norm(predicted))), (K, C, D); None stands for zeros."""
        if predicted_KCD is None:  # zeros stay zeros through the norm and an MLP without biases
            return self.post_norm(embedded_KCD)
        normed_KCD = self.pre_norm(predicted_KCD, compute_dtype(predicted_KCD))
        gated_KCI = gelu(self.gate_proj(normed_KCD)) * self.up_proj(normed_KCD)
        return self.post_norm(embedded_KCD + self.down_proj(gated_KCI))


class Router(nn.Module):
    """Softmax routing in fp32, the T best renormalised (transformers `modeling_diffusion_gemma.py`, TextRouter).

    Also the projection is computed in fp32: in bf16 experts with nearly equal scores would be chosen by rounding.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, eps: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = RMSNorm(width, eps, scale=False)
        self.proj = nn.Linear(width, num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.per_expert_scale = nn.Parameter(torch.ones(num_experts))

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts, int64 (N, T), and their weights, float32 (N, T)."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            normed_ND = self.norm(hidden_ND.float()) * self.scale.float() * hidden_ND.shape[-1] ** -0.5
            shares_NE = F.linear(normed_ND, self.proj.weight.float()).softmax(dim=-1)
            weights_NT, experts_NT = shares_NE.topk(self.top_k, dim=-1)
            scale_NT = self.per_expert_scale.float().expand_as(shares_NE).gather(1, experts_NT)
            return experts_NT, weights_NT / weights_NT.sum(dim=-1, keepdim=True) * scale_NT

    def freeze_routing(self) -> None:
        """Freeze projection and scale, so that routing stays as released.

        `per_expert_scale` stays trainable, as in NeMo AutoModel's DiffusionGemma recipe.
        """
        self.proj.weight.requires_grad_(False)
        self.scale.requires_grad_(False)


class Layer(nn.Module):
    """Attention, then a dense MLP and a mixture of experts side by side, each between two norms."""

    def __init__(self, config: DiffusionGemmaConfig, layer_type: str) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.dispatch: Dispatch = local_dispatch
        self.self_attn = Attention(config, layer_type)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.router = Router(width, config.num_experts, config.top_k_experts, eps)
        self.experts = Experts(config.num_experts, width, config.moe_intermediate_size, gelu)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(width, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(width, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(width, eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self, hidden_BLD: Tensor, inputs: AttentionInputs, past: tuple[Tensor, Tensor] | None, scalar: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (hidden states (B, L, D), own keys, own values); `scalar`: the encoder's or the decoder's."""
        residual, compute = hidden_BLD.dtype, compute_dtype(hidden_BLD)
        mixed_BLD, keys, values = self.self_attn(self.input_layernorm(hidden_BLD, compute), inputs, past)
        hidden_BLD = hidden_BLD + self.post_attention_layernorm(mixed_BLD, residual)
        dense_BLD = self.mlp(self.pre_feedforward_layernorm(hidden_BLD, compute))
        dense_BLD = self.post_feedforward_layernorm_1(dense_BLD, residual)
        flat_ND = hidden_BLD.flatten(0, 1)
        experts_NT, weights_NT = self.router(flat_ND)
        normed_ND = self.pre_feedforward_layernorm_2(flat_ND, compute)
        sparse_ND = self.dispatch(normed_ND, experts_NT, weights_NT, self.experts).to(residual)
        sparse_BLD = self.post_feedforward_layernorm_2(sparse_ND.view_as(hidden_BLD), residual)
        hidden_BLD = hidden_BLD + self.post_feedforward_layernorm(dense_BLD + sparse_BLD, residual)
        return hidden_BLD * scalar, keys, values


@cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """Return a number rounded to a dtype; remembered, so that a pass makes no tensor on the host for it."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


class EncoderScalar(nn.Module):
    """A layer's scalar as encoder, under the name that it has in released files."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("layer_scalar", torch.ones(1))


class Stack(nn.Module):
    """Embedding, layers, final norm and self-conditioning: the module `model.decoder` of the released layout."""

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.attention_kernel: Kernel = "sdpa"
        # Left uninitialised: drawing on the meta device would import PyTorch's compiler. `initialise` draws.
        table_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table_VD, freeze=False, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config, layer_type) for layer_type in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)

    @property
    def embedding_scale(self) -> float:
        """√D rounded to the embedding's dtype as in the released model; on the host, so that no device waits for it."""
        return rounded(self.config.hidden_size**0.5, self.embed_tokens.weight.dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return embeddings times √D."""
        return self.embed_tokens(input_ids) * self.embedding_scale

    def forward(
        self,
        hidden_BLD: Tensor,
        inputs: dict[str, AttentionInputs],
        past: Encoded | None,
        rows: Tensor | None,
        scalars: Sequence[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run all layers; return (final hidden states, normed, own keys and own values of each layer).

        Args:
            hidden_BLD: embeddings.
            past: keys and values that come before the own ones.
            rows: int64 (B,), row of `past` that each row continues; None = its own.
            scalars: each layer's scalar in this role.
        """
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        keys, values = [], []
        for number, (layer_type, layer) in enumerate(zip(self.config.layer_types, self.layers, strict=True)):
            before = None
            if past is not None:
                stored = (past.keys[number], past.values[number])
                cut = tuple(tensor[:, :, inputs[layer_type].columns] for tensor in stored)
                before = cut if rows is None else tuple(take_rows(tensor, rows) for tensor in cut)
            run = partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
            hidden_BLD, own_keys, own_values = run(hidden_BLD, inputs[layer_type], before, scalars[number])
            keys.append(own_keys)
            values.append(own_values)
        return self.norm(hidden_BLD, hidden_BLD.dtype), tuple(keys), tuple(values)


class DiffusionGemma(nn.Module):
    """The whole network: `encode` reads clean tokens, `decode` denoises a canvas, `logits` applies the head."""

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        super().__init__()
        self.config = config
        scalars = nn.ModuleList(EncoderScalar() for _ in config.layer_types)
        encoder = nn.ModuleDict({"language_model": nn.ModuleDict({"layers": scalars})})
        self.model = nn.ModuleDict({"decoder": Stack(config), "encoder": encoder})

    @property
    def stack(self) -> Stack:
        """The layers, in a ModuleDict so that state-dict keys equal the released ones."""
        return self.model["decoder"]  # pyright: ignore[reportReturnType]

    @property
    def head(self) -> Head:
        """The output head: the embedding, softcapped."""
        return Head(self.stack.embed_tokens.weight, softcap=self.config.final_logit_softcapping)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Raise ModelError: the encoder and the decoder role each have a method of their own."""
        raise ModelError("DiffusionGemma has no single forward pass; call encode(tokens), then decode(canvas, encoded)")

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past: Encoded | None = None,
        rows: Tensor | None = None,
    ) -> Encoded:
        """Run the stack causally over clean tokens; return their keys and values for `decode`.

        Args:
            input_ids: int64 (B, L).
            attention_mask: None or (B, L), bool or 0/1, 1 = a token; positions count tokens, so padding may stand on
                either side. Right padding needs no mask if its outputs are not used.
            past: tokens encoded before, which these attend to. The result has keys and values of these alone, to be
                kept beside the others, and the lengths of both.
            rows: int64 (B,), row of `past` that each row continues; None = its own.

        Raises:
            ModelError: more tokens than `max_position_embeddings`.
        """
        stack, (batch, length) = self.stack, input_ids.shape
        self._check_length(length + (0 if past is None else past.positions_BS.shape[1]))
        before_B, before_BS = (None, None) if past is None else (past.lengths_B, past.positions_BS)
        if before_B is not None and before_BS is not None and rows is not None:
            before_B, before_BS = before_B[rows], before_BS[rows]
        offset = 0 if before_B is None else before_B[:, None]
        if attention_mask is None:
            # (1, L) without `past`: all rows share positions and mask.
            positions_BL = own_BL = torch.arange(length, device=input_ids.device)[None] + offset
            lengths_B = torch.full((batch,), length, device=input_ids.device)
        else:
            keep_BL = attention_mask.bool()
            positions_BL = (keep_BL.cumsum(dim=1) - 1).clamp(min=0) + offset
            own_BL = positions_BL.masked_fill(~keep_BL, PADDING_POSITION)
            lengths_B = keep_BL.sum(dim=1)
        columns_BS = own_BL if before_BS is None else torch.cat((before_BS, own_BL), dim=1)
        lengths_B = lengths_B if before_B is None else before_B + lengths_B
        inputs = {}
        for layer_type in dict.fromkeys(self.config.layer_types):
            window = self.config.sliding_window if layer_type == SLIDING else None
            causal = attention_mask is None and past is None and (window is None or length <= window)
            mask = None if causal else causal_mask(positions_BL, columns_BS, window)
            mask = prepare_mask(mask, stack.attention_kernel, batch, length, columns_BS.shape[1])
            inputs[layer_type] = AttentionInputs(*self._rotary(positions_BL, layer_type), mask, causal, slice(None))
        scalars = [module.layer_scalar for module in self.model["encoder"]["language_model"]["layers"]]  # pyright: ignore
        hidden_BLD, keys, values = stack(stack.embed(input_ids), inputs, past, rows, scalars)
        aligned = attention_mask is None and past is None
        return Encoded(keys, values, hidden_BLD, own_BL.expand(batch, -1), lengths_B, aligned)

    def decode(
        self,
        canvas_ids: Tensor,
        encoded: Encoded,
        self_conditioning: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        starts: Sequence[int] | None = None,
        starts_K: Tensor | None = None,
        bounds: tuple[int, int] | None = None,
        canvas_mask: Tensor | None = None,
    ) -> Tensor:
        """Denoise canvases in both directions, each seeing the clean tokens before it.

        Args:
            canvas_ids: int64 (K, C).
            encoded: the clean tokens.
            self_conditioning: (K, C, D), `soft_embedding` of the previous pass's logits, zeros where a canvas has none;
                None = all zeros.
            rows: int64 (K,), row of `encoded` that each canvas belongs to; None = canvas k to row k.
            starts: position of each canvas's first token, on the host, so that unseen columns are cut off without
                waiting for the device. None = right after all encoded tokens of its row.
            starts_K: the same as int64 (K,) on the device; None = copied there, unless all canvases start together.
            bounds: least and greatest start, on the host, where `starts` is None: columns that no canvas within them
                sees are cut off, so that shapes depend on nothing but them. Equal ones say that no canvas needs a mask.
            canvas_mask: bool (K, C), False at padding; None = no padding.

        Returns:
            final hidden states (K, C, D), normed.
        """
        stack, (canvases, length) = self.stack, canvas_ids.shape
        if starts is None and bounds is None and encoded.aligned:
            starts = [encoded.positions_BS.shape[1]] * canvases
        if starts is not None:
            bounds = (min(starts), max(starts))
        if starts is not None and len(set(starts)) == 1:  # filled on the device, no copy
            starts_K = torch.full((canvases,), starts[0], device=canvas_ids.device)
        elif starts is not None and starts_K is None:
            starts_K = torch.tensor(starts, dtype=torch.int64).to(canvas_ids.device, non_blocking=True)
        elif starts_K is None:
            starts_K = encoded.lengths_B if rows is None else encoded.lengths_B[rows]
        positions_KC = starts_K[:, None] + torch.arange(length, device=canvas_ids.device)
        inputs = {}
        for layer_type in dict.fromkeys(self.config.layer_types):
            window = self.config.sliding_window if layer_type == SLIDING else None
            columns, all_seen = _seen_columns(encoded, bounds, window)
            mask = None
            if canvas_mask is not None or not all_seen:
                before_KS = encoded.positions_BS[:, columns]
                before_KS = past_mask(before_KS if rows is None else before_KS[rows], starts_K, window)
                own_KC = torch.ones_like(canvas_ids, dtype=torch.bool) if canvas_mask is None else canvas_mask
                mask = torch.cat((before_KS, own_KC), dim=1)[:, None, None]
                mask = prepare_mask(mask, stack.attention_kernel, canvases, length, mask.shape[3])
            inputs[layer_type] = AttentionInputs(*self._rotary(positions_KC, layer_type), mask, False, columns)
        scalars = [layer.layer_scalar for layer in stack.layers]
        if self_conditioning is not None:
            self_conditioning = self_conditioning * stack.embedding_scale
        embedded_KCD = stack.self_conditioning(stack.embed(canvas_ids), self_conditioning)
        return stack(embedded_KCD, inputs, encoded, rows, scalars)[0]  # pyright: ignore[reportArgumentType]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return softcapped fp32 logits (..., V) of hidden states (..., D)."""
        return self.head.logits(hidden)

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Return softmax(logits) @ embedding, (..., D), of softcapped logits (..., V): `self_conditioning` of `decode`.

        `unmask.ops.soft_embedding` computes the same from hidden states without holding all logits.
        """
        weight_VD = self.stack.embed_tokens.weight
        return logits.softmax(dim=-1, dtype=torch.float32).to(weight_VD.dtype) @ weight_VD

    def _rotary(self, positions_BL: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        config = self.config
        if layer_type == FULL:
            pairs = int(config.full_rotary_factor * config.full_head_dim // 2)
            return rotary_tables(positions_BL, config.full_head_dim, config.full_rope_theta, pairs)
        return rotary_tables(positions_BL, config.head_dim, config.sliding_rope_theta)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise ModelError(
                f"input of {length} tokens is longer than the model's max_position_embeddings "
                f"{self.config.max_position_embeddings}; shorten the prompt, seq_length or max_new_tokens"
            )


def _seen_columns(encoded: Encoded, bounds: tuple[int, int] | None, window: int | None) -> tuple[slice, bool]:
    """Return the columns that any canvas may see, and whether every canvas surely sees all of them (no mask needed).

    Uses only values on the host, so that it never waits for the device.
    """
    if bounds is None or not encoded.aligned:
        return slice(None), False
    least, greatest = bounds
    first = 0 if window is None else max(0, least - (window - 1))
    return slice(first, greatest), least == greatest <= encoded.positions_BS.shape[1]


@torch.no_grad()
def initialise(model: DiffusionGemma, generator: torch.Generator) -> None:
    """Draw fresh weights as transformers does: matrices normal of `initializer_range`, norms and scales one."""
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "scale")) or "layernorm" in name:
            parameter.fill_(1.0)
        else:
            nn.init.normal_(parameter, std=model.config.initializer_range, generator=generator)
    model.stack.embed_tokens.weight[model.config.pad_token_id].zero_()
    for buffer in model.buffers():
        buffer.fill_(1.0)
