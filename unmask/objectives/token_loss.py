"""Linear head and cross-entropy in one: the logits of a chunk of rows live, those of all rows never do.

The gradients with respect to hidden states, head and bias are computed in the forward pass, while a chunk's
probabilities are at hand (the idea of Liger's FusedLinearCrossEntropy, arXiv 2410.10989, section 3.2), so backward is a
multiplication by the incoming scalar, or not even that. One pass over the vocabulary makes the loss and the hidden
states' gradient; a head that trains needs a chunk's probabilities once more, when their normaliser is known. Matmuls
run in autocast's dtype where it is on; softmax, loss and the sums of gradients over chunks are fp32 (fp64 for fp64
inputs).

What belongs to a chunk lies with the vocabulary first, so that a tile of the vocabulary is one piece of memory.

Shapes: N scored positions, D width, V vocabulary rows, R rows of a chunk, W vocabulary rows of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.ops.rows import add_rows
from unmask.products import add_product, write_product
from unmask.tiles import SMALL_CAP, tanh_, tile_rows, tiles, write_exp

# Logits alive at once. Larger chunks make faster matmuls, smaller ones less memory: 2^26 fp32 logits are 256 MiB.
CHUNK_LOGITS = 2**26


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Σ_n w_n · CE(softmax(h_n Wᵀ + b), y_n), differentiable in hidden, weight and bias, and each CE.

    Args:
        hidden_ND: final hidden states of the scored positions, any float dtype.
        weight_VD: the head; may require gradient or not (frozen), may be the embedding (tied).
        bias_V: bias of the head or None.
        targets_N: int64 ids in 0..V-1.
        weights_N: float weight of each position's cross-entropy; a position of weight 0 is ignored: it contributes
            neither loss nor gradient, whatever its target and hidden state.
        chunk_logits: most logits alive at once; at least one row is always computed.
        softcap: c; logits are c · tanh(z / c) of the linear z (Gemma 2, arXiv 2408.00118, section 2). None = z itself.

    Returns:
        the scalar, nats, float32 (float64 for fp64 hidden states), whose gradient can be taken once and not
        differentiated, and the cross-entropies (N,) without gradient, 0 where a position is ignored.
    """
    # Blanked rather than taken out: how many are left would have to be asked of the device, and it would be waited for.
    kept_N = weights_N != 0
    hidden_ND = torch.where(kept_N[:, None], hidden_ND, 0.0)
    targets_N = torch.where(kept_N, targets_N, 0)
    if not torch.is_grad_enabled():
        # Nor are a Function's gradients: its needs_input_grad ignores no_grad, and they would be computed for nobody.
        losses_N = cross_entropies(hidden_ND, weight_VD, bias_V, targets_N, chunk_logits, softcap)
        losses_N = torch.where(kept_N, losses_N, 0.0)
        return torch.dot(losses_N, weights_N.to(losses_N.dtype)), losses_N
    compute = _compute_dtype(hidden_ND)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, weights_N, compute, chunk_logits, softcap)


@torch.no_grad()
def cross_entropies(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
    softcap: float | None = None,
) -> Tensor:
    """Return CE(softmax(h_n Wᵀ + b), y_n) of each position, without gradient.

    Args:
        hidden_ND, weight_VD, bias_V, targets_N, chunk_logits, softcap: as in `linear_cross_entropy`.

    Returns:
        (N,), nats; float32 (float64 for fp64 hidden states).
    """
    head = _Head(weight_VD, bias_V, _compute_dtype(hidden_ND), softcap)
    losses_N = torch.empty(len(hidden_ND), dtype=head.wide, device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for part in _parts(len(hidden_ND), max(1, chunk_logits // len(weight_VD))):
            scored = head.score(hidden_ND[part], targets_N[part], None, mixes=False)
            losses_N[part] = scored.logsum_R - scored.own_R * head.scale
    return losses_N


def working_bytes(positions: int, vocabulary: int, compute_bytes: int, head_trains: bool, device: str) -> int:
    """Return the bytes that `linear_cross_entropy` works in beside inputs and gradients.

    Args:
        positions: scored positions.
        vocabulary: rows of the head.
        compute_bytes: bytes of a number of the compute dtype.
        head_trains: whether the head's gradient is wanted, for which a chunk of logits is kept.
        device: `cpu` or `cuda`.
    """
    rows = min(positions, max(1, CHUNK_LOGITS // vocabulary))
    tile = min(vocabulary, tile_rows(device, rows))
    # A tile's scores in fp32, and in a narrower dtype the product that they come from and the one that they become.
    room = tile * rows * (4 + (2 * compute_bytes if compute_bytes < 4 else 0))
    return room + (compute_bytes * vocabulary * rows if head_trains else 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, bias_V, targets_N, weights_N, compute, chunk_logits, softcap):  # noqa: ANN001
        """Return the summed loss and each, and save the finished gradients; arguments as in `linear_cross_entropy`."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = _Head(weight_VD, bias_V, compute, softcap)
        wide = {"dtype": head.wide, "device": hidden_ND.device}
        sums = _Gradients(
            torch.empty_like(hidden_ND) if needs_hidden else None,
            (torch.empty if len(hidden_ND) else torch.zeros)(weight_VD.shape, **wide) if needs_weight else None,
            torch.zeros(len(weight_VD), **wide) if needs_bias else None,
        )
        losses_N = torch.empty(len(hidden_ND), **wide)
        parts = _parts(len(hidden_ND), max(1, chunk_logits // len(weight_VD)))
        most = max((part.stop - part.start for part in parts), default=0)
        memory = None
        if needs_weight or needs_bias:
            memory = torch.empty(len(weight_VD) * most, dtype=head.products, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part in parts:
                rows = _Rows(hidden_ND[part], targets_N[part], weights_N[part].to(head.wide))
                size = len(weight_VD) * len(rows.targets_R)
                kept_VR = None if memory is None else memory[:size].view(len(weight_VD), -1)
                scored = head.score(rows.hidden_RD, rows.targets_R, kept_VR, needs_hidden)
                losses_R = scored.logsum_R - scored.own_R * head.scale
                losses_N[part] = torch.where(rows.weights_R != 0, losses_R, 0.0)
                head.accumulate(sums, part, rows, scored)
        ctx.save_for_backward(
            sums.hidden_ND,
            None if sums.weight_VD is None else sums.weight_VD.to(weight_VD.dtype),
            None if sums.bias_V is None else sums.bias_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(losses_N)
        return torch.dot(losses_N, weights_N.to(head.wide)), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, _):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place: the buffers are ours alone, and the head's is as large as the head. A second backward, which would
        # find them in other hands, is refused by autograd, which sees that saved tensors changed.
        saved = ctx.saved_tensors
        grads = [grad for grad in saved if grad is not None]
        # Of a CPU it costs nothing to ask whether this is the last operation; a device would be waited for.
        if grad_loss.device.type == "cpu" and grad_loss == 1:
            torch.autograd.graph.increment_version(grads)
        else:
            for grad in grads:
                grad.mul_(grad_loss)
        return *saved, None, None, None, None, None


@dataclass(frozen=True)
class _Gradients:
    """The gradients under construction, None for what needs none."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


@dataclass(frozen=True)
class _Rows:
    """A chunk of rows: what they were given."""

    hidden_RD: Tensor
    targets_R: Tensor
    weights_R: Tensor


@dataclass(frozen=True)
class _Scored:
    """What one pass over the vocabulary says of R rows.

    Attributes:
        logsum_R: log Σ exp(logits).
        own_R: the targets' scores.
        top_R: their largest logits, or 0 where a cap bounds them.
        kept: of each tile that the head's gradient needs: its place in the vocabulary, the largest logits so far (R,)
            and exp(logit − that) · slope (W, R) in the dtype of `products`, the targets' blanked.
        mixed_RD: Σ_v exp(logit − top) · slope · w_v, the targets' terms left out; None where nobody asked for it.
    """

    logsum_R: Tensor
    own_R: Tensor
    top_R: Tensor
    kept: list[tuple[slice, Tensor, Tensor]]
    mixed_RD: Tensor | None


@dataclass(frozen=True)
class _Head:
    """One head: the linear map and what follows it, worked on in tiles of the vocabulary that stay in the cache.

    A score is z, or tanh(z / c) where there is a cap: from either, the logit (score · scale) and its slope follow
    without another matmul. What is kept of a logit is finished but for a factor a row and tile: exp(logit − top) ·
    slope, where top is the row's largest logit so far, or 0 where a cap bounds all.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    compute: torch.dtype
    softcap: float | None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of what is summed: fp32, or fp64 where the inputs are."""
        return torch.promote_types(self.compute, torch.float32)

    @property
    def products(self) -> torch.dtype:
        """The dtype of the gradients' matmuls: fp16, which ends at 65,504, does not hold sums over a vocabulary."""
        return torch.float32 if self.compute == torch.float16 else self.compute

    @property
    def scale(self) -> float:
        """Logit of a score of one."""
        return 1.0 if self.softcap is None else self.softcap

    @property
    def bounded(self) -> bool:
        """Whether exp(logit) needs no maximum: every row's top is then 0."""
        return self.softcap is not None and self.softcap <= SMALL_CAP

    def score(self, hidden_RD: Tensor, targets_R: Tensor, kept_VR: Tensor | None, mixes: bool) -> _Scored:
        """Pass over the vocabulary once, everything that is done to a tile of logits done while it is in the cache.

        The running maximum and what is summed relative to it follow each other as in Milakov & Gimelshein 2018 (arXiv
        1805.02867). The target's entry is left out of what is kept and mixed: it goes its own way in the wide dtype,
        since its 1 − p would be lost beside the others' p in a narrow one.

        Args:
            hidden_RD, targets_R: the rows.
            kept_VR: where to keep what the head's gradient needs, in the dtype of `products`; None where it needs none.
            mixes: whether to sum what the hidden states' gradient needs.
        """
        hidden_DR = hidden_RD.to(self.compute).t().contiguous()
        most = min(tile_rows(hidden_DR.device.type, len(hidden_RD)), len(self.weight_VD))
        # Scores are written where products are kept, unless those are narrower; a cap's slope needs both at once.
        in_place = kept_VR is not None and kept_VR.dtype == self.wide
        room_WR = None if in_place else self._tile_of(hidden_DR, most)
        other_WR = None if self.softcap is None else self._tile_of(hidden_DR, most)
        top_R = torch.full_like(hidden_DR[0], 0.0 if self.bounded else -math.inf, dtype=self.wide)
        total_R, own_R, kept = torch.zeros_like(top_R), torch.zeros_like(top_R), []
        mixed_RD = torch.zeros_like(hidden_RD, dtype=self.wide) if mixes else None
        for tile in tiles(len(self.weight_VD), most):
            size, weight_WD = tile.stop - tile.start, self.weight_VD[tile].to(self.compute)
            scores_WR = kept_VR[tile] if room_WR is None else room_WR[:size]  # pyright: ignore[reportOptionalSubscript]
            self._score_tile(tile, weight_WD, hidden_DR, scores_WR)
            places_R = targets_R - tile.start
            inside_R, places_1R = (places_R >= 0) & (places_R < size), places_R.clamp(0, size - 1)[None]
            own_R = torch.where(inside_R, scores_WR.gather(0, places_1R)[0], own_R)
            if not self.bounded:
                before_R, top_R = top_R, torch.maximum(top_R, scores_WR.amax(dim=0).mul_(self.scale))
                lower_R = (before_R - top_R).exp_()
                total_R *= lower_R
                if mixed_RD is not None:
                    mixed_RD *= lower_R[:, None]
            shares_WR = scores_WR if other_WR is None else other_WR[:size]
            total_R += write_exp(shares_WR, scores_WR, -top_R, self.scale).sum(dim=0)
            if kept_VR is None and mixed_RD is None:
                continue
            if self.softcap is not None:
                torch.ops.aten.tanh_backward.grad_input(shares_WR, scores_WR, grad_input=scores_WR)
            others_R = torch.where(inside_R, 0.0, scores_WR.gather(0, places_1R)[0])
            products_WR = scores_WR.scatter_(0, places_1R, others_R[None]).to(self.products)
            if kept_VR is not None:
                kept.append((tile, top_R, products_WR if in_place else kept_VR[tile].copy_(products_WR)))
            if mixed_RD is not None:
                add_product(mixed_RD, products_WR.t(), weight_WD.to(self.products))
        return _Scored(total_R.log_().add_(top_R), own_R, top_R, kept, mixed_RD)

    def _tile_of(self, hidden_DR: Tensor, rows: int) -> Tensor:
        """Return memory for a tile of R rows."""
        return torch.empty(rows, hidden_DR.shape[1], dtype=self.wide, device=hidden_DR.device)

    def _score_tile(self, tile: slice, weight_WD: Tensor, hidden_DR: Tensor, out_WR: Tensor) -> None:
        """Write the scores of a tile."""
        write_product(out_WR, weight_WD, hidden_DR, 1 / self.scale)
        if self.bias_V is not None:
            out_WR.add_(self.bias_V[tile, None], alpha=1 / self.scale)
        if self.softcap is not None:
            tanh_(out_WR, self.softcap)

    def accumulate(self, sums: _Gradients, part: slice, rows: _Rows, scored: _Scored) -> None:
        """Add R rows' gradients: w · (softmax − onehot) · slope, then through the linear map.

        What a row's entries share is multiplied where it costs least: into its few numbers, not into its V logits.
        """
        hidden_RD = rows.hidden_RD.to(self.wide)
        own_R = torch.expm1(scored.own_R * self.scale - scored.logsum_R) * rows.weights_R
        if self.softcap is not None:
            own_R *= 1 - scored.own_R.square()
        if sums.hidden_ND is not None and scored.mixed_RD is not None:
            shared_R = rows.weights_R * (scored.top_R - scored.logsum_R).exp_()
            own_RD = own_R[:, None] * self.weight_VD[rows.targets_R].to(self.wide)
            sums.hidden_ND[part] = own_RD.addcmul_(scored.mixed_RD, shared_R[:, None]).to(sums.hidden_ND.dtype)
        for tile, top_R, products_WR in scored.kept:
            shared_R = rows.weights_R * (top_R - scored.logsum_R).exp_()
            if sums.weight_VD is not None:
                shared_RD = (hidden_RD * shared_R[:, None]).to(self.products)
                put = write_product if part.start == 0 else add_product
                put(sums.weight_VD[tile], products_WR, shared_RD)
            if sums.bias_V is not None:
                sums.bias_V[tile] += torch.mv(products_WR.to(self.wide), shared_R)
        if sums.weight_VD is not None:
            add_rows(sums.weight_VD, rows.targets_R, hidden_RD * own_R[:, None])
        if sums.bias_V is not None:
            add_rows(sums.bias_V, rows.targets_R, own_R)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _parts(length: int, most: int) -> list[slice]:
    """Divide 0..length into as few parts as `most` allows, of nearly the same size."""
    if not length:
        return []
    size = -(-length // -(-length // most))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
