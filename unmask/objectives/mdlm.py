"""Objective `mdlm`: masked diffusion as LLaDA trains it (Nie et al. 2025, arXiv 2502.09992, eq. 3 and 5).

Shapes: B rows, L positions, N scored positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.batch import Batch, LossTerms, NoisyBatch, Pass, TokenLosses, Work
from unmask.objectives.noise import absorb, mask_probability, stratified_time
from unmask.objectives.registry import Shown
from unmask.objectives.terms import ScoredTerm, loss_terms, token_losses
from unmask.ops.rows import take_rows
from unmask.rng import NoiseStream


@dataclass(frozen=True)
class MDLM:
    """Mask supervised tokens at a random level, predict them where they were masked, weight each by 1/p.

    Attributes:
        mask_token_id: the id that replaces a token.
        eps: smallest mask probability.
        normalization: `token` divides Σ CE/p by the supervised tokens of the global batch (NeMo AutoModel, dllm);
            `sequence` divides each row's Σ CE/p by its answer length and the whole by the rows (LLaDA's GUIDELINES.md).
        time_sampling: `iid` draws t for each row; `stratified` spreads the t of a global batch evenly.
    """

    mask_token_id: int
    eps: float = 1e-3
    normalization: str = "token"
    time_sampling: str = "iid"

    def corrupt(self, batch: Batch, rng: NoiseStream) -> NoisyBatch:
        """Draw one t a row and mask its supervised tokens; a function of the batch's sample ids and epoch alone."""
        rows, length = batch.input_ids_BL.shape
        time_B = rng.uniform("time", batch.epoch, batch.sample_ids_B, 1)[:, 0]
        if self.time_sampling == "stratified":
            time_B = stratified_time(time_B, batch.slots_B, batch.global_rows)
        p_B = mask_probability(time_B, self.eps)
        draws_BL = rng.uniform("mask", batch.epoch, batch.sample_ids_B, length)
        noisy_BL, masked_BL = absorb(batch.input_ids_BL, batch.supervised_BL, p_B, draws_BL, self.mask_token_id)
        return self.noisy(batch, noisy_BL, masked_BL, p_B[:, None].expand(rows, length))

    def noisy(self, batch: Batch, noisy_ids_BL: Tensor, masked_BL: Tensor, p_BL: Tensor) -> NoisyBatch:
        """Assemble what the loss needs from given noise.

        Args:
            batch: the clean rows.
            noisy_ids_BL: ids with masks in place.
            masked_BL: bool, where.
            p_BL: mask probability at each position, in (0, 1].
        """
        weights_BL = torch.where(masked_BL, 1.0 / p_BL, 0.0)
        if self.normalization == "sequence":
            weights_BL = weights_BL / batch.answer_lengths_B.clamp(min=1)[:, None]
            count = float(len(batch.input_ids_BL))
        else:
            count = float(batch.supervised_BL.sum())
        attends = None if bool(batch.attention_mask_BL.all()) else batch.attention_mask_BL
        positions_N = masked_BL.flatten().nonzero()[:, 0]
        levels_N = p_BL.flatten()[positions_N].float()
        return NoisyBatch(batch, noisy_ids_BL, attends, masked_BL, positions_N, weights_BL, levels_N, {"mdlm": count})

    def loss(self, model: Any, noisy: NoisyBatch, counts: Mapping[str, float] | None = None) -> LossTerms:
        """Run the network once and score the masked positions, gathered before the head."""
        return loss_terms(model, self._scored(model, noisy), noisy.counts, counts)

    @torch.no_grad()
    def token_losses(self, model: Any, noisy: NoisyBatch) -> dict[str, TokenLosses]:
        """Return the loss of each masked position."""
        return token_losses(model, self._scored(model, noisy), noisy.counts)

    def work(self, noisy: NoisyBatch) -> Work:
        """Return the one pass over all positions, and how many of them are masked."""
        rows, length = noisy.noisy_ids_BL.shape
        return Work((Pass(length, (0,) * rows),), len(noisy.positions_N))

    def shown(self, noisy: NoisyBatch, row: int) -> Shown:
        """Return a row with its masks."""
        there_L = noisy.clean.attention_mask_BL[row]
        hidden = noisy.scored_BL[row][there_L].tolist()
        what = f"{sum(hidden)} of {int(noisy.clean.supervised_BL[row].sum())} supervised tokens masked"
        return Shown(what, noisy.noisy_ids_BL[row][there_L].tolist(), hidden, [False] * len(hidden))

    def _scored(self, model: Any, noisy: NoisyBatch) -> dict[str, ScoredTerm]:
        """Run the network; return what there is to score, of masked positions alone."""
        hidden_BLD = model(noisy.noisy_ids_BL, noisy.attention_mask_BL)
        scored_ND = take_rows(hidden_BLD.flatten(0, 1), noisy.positions_N)
        targets_N = noisy.clean.input_ids_BL.flatten()[noisy.positions_N]
        return {"mdlm": ScoredTerm(scored_ND, targets_N, noisy.weights_BL.flatten()[noisy.positions_N], noisy.levels_N)}
