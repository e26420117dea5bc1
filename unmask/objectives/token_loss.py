"""Linear head and cross-entropy in one: the logits of a chunk of rows live, those of all rows never do.

The gradients with respect to hidden states, head and bias are computed in the forward pass, while a chunk's
probabilities are at hand (the idea of Liger's FusedLinearCrossEntropy, arXiv 2410.10989, section 3.2), so backward is a
multiplication by the incoming scalar. Matmuls run in autocast's dtype where it is on; softmax, loss and the sums of
gradients over chunks are fp32 (fp64 for fp64 inputs).

Shapes: N scored positions, D width, V vocabulary rows, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits alive at once. Larger chunks make faster matmuls, smaller ones less memory: 2^26 fp32 logits are 256 MiB.
CHUNK_LOGITS = 2**26
# Vocabulary rows worked on at a time. On a CPU a tile of logits stays in the cache through all that is done to it;
# elsewhere it bounds what is cast from master weights to a narrower compute dtype: there is never a whole copy.
TILE_ROWS = 2**12
DEVICE_TILE_ROWS = 2**16


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
    softcap: float | None = None,
) -> Tensor:
    """Return Σ_n w_n · CE(softmax(h_n Wᵀ + b), y_n), differentiable in hidden, weight and bias.

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
        scalar, nats; float32 (float64 for fp64 hidden states). Its gradient can be taken once, and not differentiated.
    """
    if not torch.is_grad_enabled():
        # A Function's needs_input_grad ignores no_grad: validation would compute gradients that nobody asked for.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    # Blanked rather than taken out: how many are left would have to be asked of the device, and it would be waited for.
    kept_N = weights_N != 0
    hidden_ND = torch.where(kept_N[:, None], hidden_ND, 0.0)
    targets_N = torch.where(kept_N, targets_N, 0)
    kind = hidden_ND.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, weights_N, compute, chunk_logits, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, bias_V, targets_N, weights_N, compute, chunk_logits, softcap):  # noqa: ANN001
        """Return the summed loss and save the finished gradients; arguments as in `linear_cross_entropy`."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = {"dtype": _wide(compute), "device": hidden_ND.device}
        sums = _Gradients(
            torch.empty_like(hidden_ND) if needs_hidden else None,
            torch.zeros(weight_VD.shape, **wide) if needs_weight else None,
            torch.zeros(len(weight_VD), **wide) if needs_bias else None,
        )
        loss = torch.zeros((), **wide)
        head = _Head(weight_VD, bias_V, compute, softcap)
        rows = max(1, chunk_logits // len(weight_VD))
        scores_RV = torch.empty(min(rows, len(hidden_ND)), len(weight_VD), **wide)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), rows):
                part = slice(start, start + rows)
                hidden_RD, targets_R = hidden_ND[part].to(compute), targets_N[part, None]
                weights_R = weights_N[part, None].to(loss.dtype)
                scores = scores_RV[: len(hidden_RD)]
                total_R = head.score(hidden_RD, scores)
                loss += ((total_R - head.logits(scores.gather(1, targets_R))) * weights_R).sum()
                if needs_hidden or needs_weight or needs_bias:
                    head.accumulate(sums, part, hidden_RD, scores, total_R, targets_R, weights_R)
        ctx.save_for_backward(
            sums.hidden_ND,
            None if sums.weight_VD is None else sums.weight_VD.to(weight_VD.dtype),
            None if sums.bias_V is None else sums.bias_V.to(bias_V.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place: the buffers are ours alone, and the head's is as large as the head. A second backward is refused by
        # autograd, which sees that saved tensors changed.
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


@dataclass(frozen=True)
class _Gradients:
    """The gradients under construction, None for what needs none."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


@dataclass(frozen=True)
class _Head:
    """One head: the linear map and what follows it, worked on in tiles of the vocabulary that stay in the cache.

    `scores` are z, or tanh(z / c) where there is a cap: from either, logits and their slope follow without another
    matmul.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    compute: torch.dtype
    softcap: float | None

    def tiles(self) -> list[slice]:
        """Return the tiles of the vocabulary."""
        size = TILE_ROWS if self.weight_VD.device.type == "cpu" else DEVICE_TILE_ROWS
        return [slice(start, start + size) for start in range(0, len(self.weight_VD), size)]

    def logits(self, scores: Tensor) -> Tensor:
        """Return the logits that scores stand for."""
        return scores if self.softcap is None else scores * self.softcap

    def score(self, hidden_RD: Tensor, scores_RV: Tensor) -> Tensor:
        """Write the scores of R rows; return log Σ exp(logits), (R, 1)."""
        top_R = total_R = None
        for tile in self.tiles():
            product_RW = torch.mm(hidden_RD, self.weight_VD[tile].to(self.compute).t()).to(scores_RV.dtype)
            if self.bias_V is not None:
                product_RW += self.bias_V[tile]
            if self.softcap is None:
                scores_RV[:, tile] = product_RW
            else:
                torch.tanh(product_RW.div_(self.softcap), out=scores_RV[:, tile])
                torch.mul(scores_RV[:, tile], self.softcap, out=product_RW)
            # Running log-sum-exp (Milakov & Gimelshein 2018, arXiv 1805.02867): the sum so far follows the maximum.
            largest_R = product_RW.amax(dim=1, keepdim=True)
            if top_R is None or total_R is None:
                top_R, total_R = largest_R, product_RW.sub_(largest_R).exp_().sum(dim=1, keepdim=True)
                continue
            largest_R = torch.maximum(top_R, largest_R)
            total_R = total_R * (top_R - largest_R).exp_() + product_RW.sub_(largest_R).exp_().sum(dim=1, keepdim=True)
            top_R = largest_R
        assert top_R is not None and total_R is not None
        return total_R.log_().add_(top_R)

    def accumulate(
        self,
        sums: _Gradients,
        part: slice,
        hidden_RD: Tensor,
        scores_RV: Tensor,
        total_R: Tensor,
        targets_R: Tensor,
        weights_R: Tensor,
    ) -> None:
        """Add R rows' gradients: w · (softmax − onehot) · slope, then through the linear map."""
        wide = scores_RV.dtype
        # Weights go where they cost least: into the few numbers a row, not into its V logits.
        weighted_RD = (hidden_RD.to(wide) * weights_R).to(self.compute)
        grad_hidden_RD = torch.zeros(hidden_RD.shape, dtype=wide, device=hidden_RD.device)
        for tile in self.tiles():
            scores_RW = scores_RV[:, tile]
            if self.softcap is None:
                grad_RW = torch.sub(scores_RW, total_R).exp_()
            else:
                grad_RW = torch.add(-total_R, scores_RW, alpha=self.softcap).exp_()
            inside_R = (targets_R >= tile.start) & (targets_R < tile.stop)
            columns_R = (targets_R - tile.start).clamp_(0, grad_RW.shape[1] - 1)
            grad_RW.scatter_add_(1, columns_R, -inside_R.to(wide))
            if self.softcap is not None:
                grad_RW.addcmul_(torch.square(scores_RW), grad_RW, value=-1)
            if sums.bias_V is not None:
                sums.bias_V[tile] += (grad_RW * weights_R).sum(dim=0)
            grad_RW = grad_RW.to(self.compute)
            if sums.hidden_ND is not None:
                _add_product(grad_hidden_RD, grad_RW, self.weight_VD[tile].to(self.compute))
            if sums.weight_VD is not None:
                _add_product(sums.weight_VD[tile], grad_RW.t(), weighted_RD)
        if sums.hidden_ND is not None:
            sums.hidden_ND[part] = grad_hidden_RD.mul_(weights_R).to(sums.hidden_ND.dtype)


def _wide(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of what is summed: fp32, or fp64 where the inputs are."""
    return torch.promote_types(compute, torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right in place; the product is made in its own dtype, the sum kept in the total's."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
