"""DiffusionGemma in the denoising loop: prompts and finished canvases are encoded once, and a call runs canvases alone.

Shapes: B rows, K rows that completed a canvas, L positions, S canvas positions, M = B·S scored positions, D width,
V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.models.diffusion_gemma.cache import Encoded
from unmask.sampling.adapters import FamilySpec
from unmask.sampling.scratch import Scratch

if TYPE_CHECKING:
    from unmask.models.diffusion_gemma.model import DiffusionGemma


@dataclass(frozen=True)
class Canvases:
    """What the canvases of a batch see beside themselves.

    Attributes:
        encoded: keys and values of each row's prompt and finished canvases, padded on the right.
        lengths: tokens encoded of each row; on the host, so that cutting columns never waits for a device.
        signal_BSD: what the network said in the call before; zeros, which is no signal, where a canvas begins.
    """

    encoded: Encoded
    lengths: tuple[int, ...]
    signal_BSD: Tensor

    def take(self, keep_B: Tensor) -> Canvases:
        """Return the rows where `keep_B` (bool, on the CPU) is True, without columns that none of them has."""
        kept = keep_B.nonzero()[:, 0]
        lengths = tuple(self.lengths[row] for row in kept.tolist())
        rows = kept.to(self.signal_BSD.device)
        encoded = self.encoded.take(rows).first(lengths) if lengths else self.encoded.take(rows)
        return Canvases(encoded, lengths, self.signal_BSD[rows])

    def told(self, signal_MD: Tensor) -> Canvases:
        """Return the same with what the network said of all positions."""
        return replace(self, signal_BSD=signal_MD.view_as(self.signal_BSD))


class CanvasAdapter:
    """DiffusionGemma, whose clean tokens never change what they are: their keys and values are kept."""

    def __init__(self, model: DiffusionGemma) -> None:
        config, generation = model.config, getattr(model, "generation", {})
        ends = generation.get("eos_token_id")
        ends = config.eos_token_ids if ends is None else ends
        self.model = model
        self.device = next(model.parameters()).device
        self._logits = Scratch()
        self.spec = FamilySpec(
            noise="uniform",
            mask_id=None,
            banned_ids=(),
            eos_ids=tuple(ends) if isinstance(ends, (list, tuple)) else (ends,),
            vocab_size=config.vocab_size,
            rows=config.rows,
            max_length=config.max_sequence_length,
        )

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Canvases:
        """Encode the prompts, padded on the right, where causal attention lets no token see the padding."""
        lengths = tuple(len(prompt) for prompt in prompts)
        ids = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
        encoded = self.model.encode(torch.tensor(ids).to(self.device)).first(lengths)
        config, dtype = self.model.config, encoded.hidden_BLD.dtype
        zeros_BSD = torch.zeros(len(prompts), config.canvas_length, config.hidden_size, dtype=dtype, device=self.device)
        return Canvases(encoded, lengths, zeros_BSD)

    @torch.no_grad()
    def denoise(self, context: Canvases, answer_BC: Tensor, rows_M: Tensor, positions_M: Tensor) -> Tensor:
        """Run each row's canvas, which all of its scored positions are; return hidden states (M, D)."""
        rows, length = context.signal_BSD.shape[:2]
        canvas_BS = answer_BC[rows_M, positions_M].view(rows, length).to(self.device)
        return self.model.decode(canvas_BS, context.encoded, context.signal_BSD, starts=context.lengths).flatten(0, 1)

    @torch.no_grad()
    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return softcapped logits (M, V) in fp32, as the model's but computed in place; valid until the next call."""
        hidden_MD, weight_VD, _ = self.model.head_inputs(hidden_MD)
        scores_MV = self._logits.rows(len(hidden_MD), len(weight_VD), like=weight_VD)
        scores_MV = torch.mm(hidden_MD.to(weight_VD.dtype), weight_VD.T, out=scores_MV).float()
        return scores_MV.div_(self.model.softcap).tanh_().mul_(self.model.softcap)

    def signal(self, weights_MV: Tensor, total_M: Tensor) -> Tensor:
        """Return softmax @ embedding · √D of a prediction, (M, D) in the embedding's dtype."""
        stack = self.model.stack
        mixed_MD = weights_MV.to(stack.embed_tokens.weight.dtype) @ stack.embed_tokens.weight
        return (mixed_MD / total_M[:, None]).to(mixed_MD.dtype) * stack.embedding_scale

    @torch.no_grad()
    def commit(self, context: Canvases, answer_BC: Tensor, block_B: Tensor, completed_B: Tensor) -> Canvases:
        """Encode finished canvases behind what their rows have; those rows' next canvases begin without a signal."""
        length = context.signal_BSD.shape[1]
        done = completed_B.nonzero()[:, 0]
        columns_KS = (block_B[done] * length)[:, None] + torch.arange(length)
        canvas_KS = answer_BC[done[:, None], columns_KS].to(self.device)
        lengths = [context.lengths[row] for row in done.tolist()]
        past = context.encoded.take(done.to(self.device)).first(lengths)
        more = self.model.encode(canvas_KS, past=past)
        encoded = context.encoded.grown(done.tolist(), more, length, context.lengths)
        grown = tuple(n + length * int(complete) for n, complete in zip(context.lengths, completed_B, strict=True))
        signal_BSD = context.signal_BSD.masked_fill(completed_B.to(self.device)[:, None, None], 0)
        return Canvases(encoded, grown, signal_BSD)
