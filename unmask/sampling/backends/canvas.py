"""The sampling backend of networks with canvases: encodes prompts and finished canvases once, then only decodes.

Shapes: B rows, K rows that completed a canvas, S canvas positions, M scored positions, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.models.diffusion_gemma.cache import stored
from unmask.models.experts import Experts, grouped_kernel
from unmask.models.folders import end_ids
from unmask.models.kv_cache import KeyValueStore
from unmask.ops.padding import padded
from unmask.sampling.backends.backend import Call, ModelSpec
from unmask.sampling.backends.replay import Replays, replays_for
from unmask.sampling.engine.state import Positions, send
from unmask.sampling.settings import SamplerSettings

# The store has a multiple of so many columns: once in several canvases it moves, and calls are recorded anew.
_COLUMNS = 1024


@dataclass(frozen=True)
class Canvases:
    """The backend's context: what the canvases of a batch see beside themselves.

    The store passes on to the next context, so that one from which another was made is used up.
    """

    store: KeyValueStore  # keys and values of each row's prompt and finished canvases; written in place
    ids: tuple[tuple[int, ...], ...]  # the tokens encoded; on the host, so that cutting never waits for a device
    conditioning_BSD: Tensor  # self-conditioning of the previous call's predictions; zeros where a canvas begins
    # Rows and canvas positions that the next `conditioned` gives values for; None = all.
    scored: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens encoded of each row."""
        return tuple(map(len, self.ids))

    def select(self, keep_B: Tensor) -> Canvases:
        """Return the rows where `keep_B` (bool, on the CPU) is True."""
        kept_K = keep_B.nonzero()[:, 0]
        ids = tuple(self.ids[row] for row in kept_K.tolist())
        rows_K = kept_K.to(self.conditioning_BSD.device)
        if kept_K.tolist() != list(range(len(kept_K))):
            self.store.keep(rows_K, max(map(len, ids)))
        return Canvases(self.store, ids, self.conditioning_BSD[rows_K])

    def concat(self, more: Canvases) -> Canvases:
        """Return these and the rows of `more` behind them."""
        rows, columns = len(more.ids), max(more.lengths, default=0)
        self.store.reserve(len(self.ids) + rows, columns, _COLUMNS)
        self.store.put(len(self.ids), more.store, rows, columns)
        conditioning_BSD = torch.cat((self.conditioning_BSD, more.conditioning_BSD))
        return Canvases(self.store, self.ids + more.ids, conditioning_BSD)

    def conditioned(self, conditioning_MD: Tensor) -> Canvases:
        """Return this with self-conditioning (M, D) of the scored positions."""
        if self.scored is None:
            return replace(self, conditioning_BSD=conditioning_MD.view_as(self.conditioning_BSD))
        return replace(
            self, conditioning_BSD=self.conditioning_BSD.index_put(self.scored, conditioning_MD), scored=None
        )


class CanvasBackend:
    """Calls an encoder-decoder with canvases; keys and values of clean tokens are exact for good, so they are kept.

    With `cache: none` a row is encoded anew after each of its canvases.
    """

    def __init__(self, model: Any, settings: SamplerSettings) -> None:
        config, generation = model.config, getattr(model, "generation", {})
        self.model = model
        self.device = next(model.parameters()).device
        self._keeps = settings.cache == "block"
        # Without a grouped kernel the host has to know how many tokens each expert has, and waits for the device.
        self._replays = replays_for(model) if _experts_are_grouped(model) else Replays(None)
        self.spec = ModelSpec(
            mask_id=None,
            banned_ids=(),
            eos_ids=end_ids(generation) or config.eos_token_ids,
            vocab_size=config.vocab_size,
            rows=config.rows,
            max_length=config.max_sequence_length,
        )

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Canvases:
        """Encode the prompts, right-padded: causal attention never sees that padding."""
        encoded = self.model.encode(padded(prompts)[0].to(self.device))
        config, dtype = self.model.config, encoded.hidden_BLD.dtype
        zeros_BSD = torch.zeros(len(prompts), config.canvas_length, config.hidden_size, dtype=dtype, device=self.device)
        return Canvases(KeyValueStore(encoded.keys, encoded.values), tuple(map(tuple, prompts)), zeros_BSD)

    @torch.no_grad()
    def denoise(self, context: Canvases, call: Call) -> tuple[Tensor, Positions, Canvases]:
        """Run each row's canvas; hidden states are (M, D).

        Given positions of a canvas are not scored; their self-conditioning is their own embedding.
        """
        rows, length = context.conditioning_BSD.shape[:2]
        columns_BS = call.first_B[:, None] + torch.arange(length)
        scored_M = call.positions.column_M - call.first_B[call.rows_M]
        lengths_B = torch.tensor(context.lengths)
        host = (call.answer_BC.gather(1, columns_BS), lengths_B, call.rows_M, scored_M, call.positions.tensor_5M)
        canvas_BS, lengths_B, rows_M, scored_M, positions_5M = send(host, self.device)
        positions = Positions(*positions_5M)
        model, store, bounds = self.model, context.store, (min(context.lengths), max(context.lengths))
        if self._replays.pads(canvas_BS.numel(), self.device):
            # A recording serves all lengths between the same multiples.
            bounds = (bounds[0] // _COLUMNS * _COLUMNS, -(-bounds[1] // _COLUMNS) * _COLUMNS)
            store.reserve(rows, bounds[1], _COLUMNS)

        def decode(canvas_BS: Tensor, conditioning_BSD: Tensor, lengths_B: Tensor) -> Tensor:
            return model.decode(canvas_BS, stored(store, bounds[1], lengths_B), conditioning_BSD, bounds=bounds)

        hidden_BSD = self._replays(store.addresses, bounds, decode, canvas_BS, context.conditioning_BSD, lengths_B)
        if len(call.rows_M) == rows * length:
            return hidden_BSD.flatten(0, 1), positions, context
        known_BSD = self.model.stack.embed_tokens(canvas_BS).to(context.conditioning_BSD.dtype)
        scored = (rows_M, scored_M)
        return hidden_BSD[scored], positions, replace(context, conditioning_BSD=known_BSD, scored=scored)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return softcapped logits (M, V) in fp32."""
        return self.model.logits(hidden_MD)

    def self_conditioning(self, weights_MV: Tensor, total_M: Tensor) -> Tensor:
        """Return softmax @ embedding of a prediction, (M, D) in the embedding's dtype."""
        weight_VD = self.model.head.weight
        mixed_MD = weights_MV.to(weight_VD.dtype) @ weight_VD
        return (mixed_MD / total_M[:, None]).to(mixed_MD.dtype)

    @torch.no_grad()
    def commit(
        self, context: Canvases, answer_BC: Tensor, first_B: Tensor, end_B: Tensor, completed_B: Tensor
    ) -> Canvases:
        """Append finished canvases to their rows' encoded tokens; the next canvases begin unconditioned."""
        length = context.conditioning_BSD.shape[1]
        spans = zip(first_B.tolist(), end_B.tolist(), completed_B.tolist(), strict=True)
        more = [answer_BC[row, first:end].tolist() if done else [] for row, (first, end, done) in enumerate(spans)]
        longest = max(map(len, more))
        step = length if self._keeps else longest
        for start in range(0, longest, step):
            context = self._append(context, [new[start : start + step] for new in more])
        return context

    def _append(self, context: Canvases, more: list[list[int]]) -> Canvases:
        """Append the tokens in `more`, one canvas a row where keys and values are kept; rows without any stay."""
        done, store, lengths = [row for row, new in enumerate(more) if new], context.store, context.lengths
        ids = tuple((*old, *new) for old, new in zip(context.ids, more, strict=True))
        new_KS = padded([more[row] if self._keeps else ids[row] for row in done])[0]
        new_KS, rows_K, lengths_B = send((new_KS, torch.tensor(done), torch.tensor(lengths)), self.device)
        positions_KS = torch.arange(new_KS.shape[1], device=self.device).expand(len(done), -1)
        if self._keeps:
            positions_KS = lengths_B[rows_K, None] + positions_KS
            past = stored(store, max(lengths[row] for row in done), lengths_B)
            encoded = self.model.encode(new_KS, past=past, rows=None if len(done) == len(ids) else rows_K)
        else:
            encoded = self.model.encode(new_KS)
        store.reserve(len(ids), max(map(len, ids)), _COLUMNS)
        for layer, (keys, values) in enumerate(zip(encoded.keys, encoded.values, strict=True)):
            store.write(layer, rows_K, positions_KS, keys, values)
        return replace(context, ids=ids, conditioning_BSD=context.conditioning_BSD.index_fill(0, rows_K, 0))


def _experts_are_grouped(model: Any) -> bool:
    """Whether all experts run as grouped kernels, for which the host need not know each expert's token count."""
    held = [layer.experts for layer in model.stack.layers]
    return all(
        type(experts) is Experts and all(grouped_kernel(weight[0], weight) for weight in experts.parameters())
        for experts in held
    )
