"""Objective `block_diffusion`: one canvas of each answer denoised over a causal encoder, as DiffusionGemma is trained.

Uniform categorical noise: a token of the canvas is replaced by a uniform draw from the vocabulary, which may be the
token itself. Sources: google-deepmind/gemma `gemma/diffusion` (hackable_diffusion_adapter), NeMo AutoModel's
DiffusionGemma recipe; canvases as in Arriola et al. 2025 (arXiv 2503.09573).

An answer of n tokens is ceil(n / C) canvases, counted from its first token; the last one is filled up with EOS, which
is part of what is learned: where to stop. Canvases do not see each other's noise, only clean tokens before them, so one
drawn canvas gives an unbiased estimate of the mean over all, at the price of one.

Shapes: B rows, L positions, T answers of the batch in the order of their rows, J most answers of a row, K = T canvases,
C positions of a canvas, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.batch import Batch, CanvasBatch, LossTerms, Pass, TokenLosses, Work
from unmask.config.data import rounded_up
from unmask.objectives.noise import mask_probability, stratified_time
from unmask.objectives.registry import Shown
from unmask.objectives.terms import ScoredTerm, loss_terms, token_losses
from unmask.ops.rows import take_rows
from unmask.ops.soft_embedding import soft_embedding
from unmask.rng import NoiseStream


@dataclass(frozen=True)
class Answers:
    """The supervised stretches of a batch.

    Attributes:
        rows_T: int64, the row of each.
        numbers_T: int64, its number within the row, from 0.
        starts_T, ends_T: int64, its first position and the one after its last.
        cut_T: bool, its end was lost to truncation.
        last_T: bool, no token follows it in its row.
    """

    rows_T: Tensor
    numbers_T: Tensor
    starts_T: Tensor
    ends_T: Tensor
    cut_T: Tensor
    last_T: Tensor


def find_answers(batch: Batch) -> Answers:
    """Return the maximal runs of supervised tokens; between two answers a template always has a header."""
    edge_BL = torch.zeros(len(batch.supervised_BL), 1, dtype=torch.int8)
    change_BL = batch.supervised_BL.to(torch.int8).diff(dim=1, prepend=edge_BL, append=edge_BL)
    rows_T, starts_T = (change_BL == 1).nonzero(as_tuple=True)
    ends_T = (change_BL == -1).nonzero(as_tuple=True)[1]
    first_B = torch.searchsorted(rows_T, torch.arange(len(batch.supervised_BL)))
    last_T = ends_T == batch.attention_mask_BL.sum(dim=1)[rows_T]
    return Answers(
        rows_T, torch.arange(len(rows_T)) - first_B[rows_T], starts_T, ends_T, batch.cut_B[rows_T] & last_T, last_T
    )


@dataclass(frozen=True)
class CanvasDiffusion:
    """Draw a canvas of each answer, corrupt it, predict its clean tokens; beside it the encoder's next-token loss.

    Attributes:
        block_size: C, the model's canvas length.
        vocab_size: noise is uniform over ids below this.
        eos_token_id: fills the last canvas of an answer.
        eps: smallest corruption level.
        encoder_loss_weight: weight of the next-token loss.
        self_conditioning_p: chance of an example to see its own first prediction.
        stop_gradient_to_encoder: the denoising loss does not reach the encoder through keys and values.
        time_sampling: `iid` or `stratified` over the global batch.
    """

    block_size: int
    vocab_size: int
    eos_token_id: int
    eps: float = 1e-3
    encoder_loss_weight: float = 1.0
    self_conditioning_p: float = 0.5
    stop_gradient_to_encoder: bool = False
    time_sampling: str = "iid"

    def corrupt(self, batch: Batch, rng: NoiseStream) -> CanvasBatch:
        """Draw a canvas, a level and noise for each answer and a coin for each row, each from a stream of its own."""
        answers, size = find_answers(batch), self.block_size
        most = int(answers.numbers_T.max()) + 1
        draw = _RowDraws(rng, batch, answers)
        blocks_T = (answers.ends_T - answers.starts_T + size - 1) // size
        # A float below 1 times n may round to n.
        chosen_T = (draw("block", most) * blocks_T).long().clamp(max=blocks_T - 1)
        starts_K = answers.starts_T + chosen_T * size

        time_K = draw("time", most)
        if self.time_sampling == "stratified":
            time_K = stratified_time(time_K, batch.slots_B[answers.rows_T], batch.global_rows)
        p_K = mask_probability(time_K, self.eps)
        replaced_KC = draw("replace", most, size) < p_K[:, None]
        tokens_KC = (draw("token", most, size) * self.vocab_size).long().clamp(max=self.vocab_size - 1)

        positions_KC = starts_K[:, None] + torch.arange(size)
        inside_KC = positions_KC < answers.ends_T[:, None]
        clean_KC = batch.input_ids_BL[answers.rows_T[:, None], positions_KC.clamp(max=batch.input_ids_BL.shape[1] - 1)]
        targets_KC = torch.where(inside_KC, clean_KC, self.eos_token_id)
        scored_KC = inside_KC | ~answers.cut_T[:, None]
        canvas_KC = torch.where(replaced_KC & scored_KC, tokens_KC, targets_KC)
        coins_P = rng.uniform("self_conditioning", batch.epoch, batch.peers_P, 1)[:, 0] < self.self_conditioning_p
        coins_B = rng.uniform("self_conditioning", batch.epoch, batch.sample_ids_B, 1)[:, 0] < self.self_conditioning_p
        filled = filled_rows(batch, answers, size, self.eos_token_id)
        return self.noisy(
            batch, *filled, answers.rows_T, starts_K, canvas_KC, targets_KC, scored_KC, p_K,
            coins_B[answers.rows_T], bool(coins_P.any()),
        )  # fmt: skip

    def noisy(
        self,
        batch: Batch,
        encoder_ids_BL: Tensor,
        attended_BL: Tensor,
        rows_K: Tensor,
        starts_K: Tensor,
        canvas_ids_KC: Tensor,
        targets_KC: Tensor,
        scored_KC: Tensor,
        levels_K: Tensor,
        conditioned_K: Tensor,
        conditioning: bool,
    ) -> CanvasBatch:
        """Assemble what the loss needs from given noise; tensors as in `CanvasBatch`.

        Args:
            encoder_ids_BL, attended_BL: what the encoder reads, padded on the right, and where it is text.
            starts_K: first position of each canvas.
            conditioned_K: bool, canvases that see their own first prediction.
            conditioning: whether a canvas on any rank does.
        """
        pairs_BL = attended_BL[:, 1:]
        positions_N = torch.nn.functional.pad(pairs_BL, (0, 1)).flatten().nonzero()[:, 0]
        conditioned_S = weight_S = None
        if conditioning:
            conditioned_S = conditioned_K.nonzero()[:, 0]
            conditioned_S = conditioned_S if len(conditioned_S) else torch.zeros(1, dtype=torch.int64)
            weight_S = conditioned_K[conditioned_S].float()
        own_rows = torch.equal(rows_K, torch.arange(len(encoder_ids_BL)))
        return CanvasBatch(
            clean=batch,
            encoder_ids_BL=encoder_ids_BL,
            encoder_positions_N=positions_N,
            encoder_targets_N=encoder_ids_BL.flatten()[positions_N + 1],
            rows_K=None if own_rows else rows_K,
            starts=tuple(starts_K.tolist()),
            starts_K=starts_K,
            canvas_ids_KC=canvas_ids_KC,
            targets_KC=targets_KC,
            scored_KC=scored_KC,
            canvas_mask_KC=None if bool(scored_KC.all()) else scored_KC,
            levels_K=levels_K.float(),
            conditioned_S=conditioned_S,
            conditioned_starts=() if conditioned_S is None else tuple(starts_K[conditioned_S].tolist()),
            conditioned_weight_S=weight_S,
            counts={"diffusion": float(scored_KC.sum()), "encoder": float(len(positions_N))},
        )

    def loss(self, model: Any, noisy: CanvasBatch, counts: Mapping[str, float] | None = None) -> LossTerms:
        """Encode the clean rows once, decode the canvases once or twice, and score both."""
        return loss_terms(model, self._scored(model, noisy), noisy.counts, counts)

    @torch.no_grad()
    def token_losses(self, model: Any, noisy: CanvasBatch) -> dict[str, TokenLosses]:
        """Return the loss of each position of the canvases, replaced or not, and of each next-token pair."""
        return token_losses(model, self._scored(model, noisy), noisy.counts)

    def work(self, noisy: CanvasBatch) -> Work:
        """Return the encoder's pass, the decoder's, and the one whose predictions the decoder sees."""
        rows, length = noisy.encoder_ids_BL.shape
        passes = [Pass(length, (0,) * rows), Pass(self.block_size, noisy.starts, outer=True)]
        if noisy.conditioned_starts:
            passes.append(Pass(self.block_size, noisy.conditioned_starts, gradient=False))
        scored = noisy.targets_KC.numel() + (len(noisy.encoder_targets_N) if self.encoder_loss_weight else 0)
        return Work(tuple(passes), scored, mixed=len(noisy.conditioned_starts) * self.block_size)

    def _scored(self, model: Any, noisy: CanvasBatch) -> dict[str, ScoredTerm]:
        """Run the network; return what there is to score for each term."""
        # First, before the pass without gradients: autocast keeps each weight's first cast until it ends, and before
        # PyTorch's pull request 165068 one made under `no_grad` left the weight without a gradient in all later passes.
        encoded = model.encode(noisy.encoder_ids_BL)
        hidden_KCD = model.decode(
            noisy.canvas_ids_KC,
            encoded.detach() if self.stop_gradient_to_encoder else encoded,
            self._self_conditioning(model, noisy, encoded),
            rows=noisy.rows_K,
            starts=noisy.starts,
            starts_K=noisy.starts_K,
            canvas_mask=noisy.canvas_mask_KC,
        )
        levels_N = noisy.levels_K[:, None].expand(noisy.scored_KC.shape).flatten()
        weights_N = noisy.scored_KC.flatten().float()
        terms = {"diffusion": ScoredTerm(hidden_KCD.flatten(0, 1), noisy.targets_KC.flatten(), weights_N, levels_N)}
        if self.encoder_loss_weight:
            hidden_ND = take_rows(encoded.hidden_BLD.flatten(0, 1), noisy.encoder_positions_N)
            ones_N = torch.ones(len(hidden_ND), device=hidden_ND.device)
            terms["encoder"] = ScoredTerm(hidden_ND, noisy.encoder_targets_N, ones_N, None, self.encoder_loss_weight)
        return terms

    def shown(self, noisy: CanvasBatch, row: int) -> Shown:
        """Return the first canvas of a row with its replaced tokens."""
        rows = range(len(noisy.starts)) if noisy.rows_K is None else noisy.rows_K.tolist()
        canvas = list(rows).index(row)
        there = noisy.scored_KC[canvas]
        ids, clean = noisy.canvas_ids_KC[canvas][there], noisy.targets_KC[canvas][there]
        changed = (ids != clean).tolist()
        what = f"canvas from position {noisy.starts[canvas]}: {sum(changed)} of {len(changed)} tokens replaced"
        return Shown(what, ids.tolist(), [False] * len(changed), changed)

    def _self_conditioning(self, model: Any, noisy: CanvasBatch, encoded: Any) -> Tensor:
        """Return the soft embedding of each canvas's own first prediction (K, C, D), zeros where it sees none.

        Zeros are passed on also where no first pass is made: so the self-conditioning weights have a gradient, of
        zeros, in every step and on every rank.
        """
        chosen_S, weight_S = noisy.conditioned_S, noisy.conditioned_weight_S
        predicted_KCD = encoded.hidden_BLD.new_zeros(*noisy.canvas_ids_KC.shape, encoded.hidden_BLD.shape[-1])
        if chosen_S is None or weight_S is None:
            return predicted_KCD
        rows_S = chosen_S if noisy.rows_K is None else noisy.rows_K[chosen_S]
        with torch.no_grad():
            hidden_SCD = model.decode(
                noisy.canvas_ids_KC[chosen_S],
                encoded,
                rows=rows_S,
                starts=noisy.conditioned_starts,
                starts_K=noisy.starts_K[chosen_S],
                canvas_mask=None if noisy.canvas_mask_KC is None else noisy.canvas_mask_KC[chosen_S],
            )
        soft_ND = soft_embedding(hidden_SCD.flatten(0, 1), model.head)
        predicted_SCD = soft_ND.view_as(hidden_SCD) * weight_S[:, None, None]
        return predicted_KCD.index_copy(0, chosen_S, predicted_SCD.to(predicted_KCD.dtype))


def filled_rows(batch: Batch, answers: Answers, size: int, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Fill an answer that ends its row up to whole canvases with EOS; return ids and where they are text, both (B, L).

    An answer that was cut is not filled: what follows it is unknown. One that is followed by another turn is not
    either, since its fill would stand in the way of that turn; its canvas has the fill all the same.
    """
    lengths_B = batch.attention_mask_BL.sum(dim=1)
    spans_T = answers.ends_T - answers.starts_T
    fill_T = torch.where(answers.last_T & ~answers.cut_T, -spans_T % size, 0)
    filled_B = lengths_B + torch.zeros_like(lengths_B).scatter_add_(0, answers.rows_T, fill_T)
    length = max(rounded_up(int(filled_B.max())), batch.input_ids_BL.shape[1])
    columns_L = torch.arange(length)
    ids_BL = batch.input_ids_BL.new_full((len(lengths_B), length), eos_token_id)
    ids_BL[:, : batch.input_ids_BL.shape[1]] = batch.input_ids_BL
    ids_BL[columns_L >= lengths_B[:, None]] = eos_token_id
    return ids_BL, columns_L < filled_B[:, None]


@dataclass(frozen=True)
class _RowDraws:
    """Uniform draws for each answer, out of its row's stream: answer j takes the j-th run of numbers."""

    rng: NoiseStream
    batch: Batch
    answers: Answers

    def __call__(self, stream: str, most: int, numbers: int = 1) -> Tensor:
        """Return float32 (T,), or (T, numbers) for more than one, in [0, 1)."""
        length = most * numbers
        all_BJN = self.rng.uniform(stream, self.batch.epoch, self.batch.sample_ids_B, length).view(-1, most, numbers)
        drawn_TN = all_BJN[self.answers.rows_T, self.answers.numbers_T]
        return drawn_TN[:, 0] if numbers == 1 else drawn_TN
