"""Cross-entropy fused with the linear head, chunk by chunk, so that the logits of all rows never exist together.

Gradients are computed in the forward pass, while a chunk's probabilities are at hand (Liger's FusedLinearCrossEntropy,
arXiv 2410.10989, section 3.2). Matmuls run in autocast's dtype where it is on; softmax, loss and sums of gradients are
fp32 (fp64 for fp64). PyTorch's own `F.linear_cross_entropy` has no softcap, and where rows have weights and losses it
makes the logits twice.

Shapes: N scored positions, R rows of a chunk, D width, V vocabulary rows, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.ops.chunks import (
    CHUNK_LOGITS,
    cached_rows,
    column_slices,
    logit_chunks,
    sum_dtype,
    write_product,
)
from unmask.ops.head import Head, compute_dtype


def linear_cross_entropy(
    hidden_ND: Tensor, head: Head, targets_N: Tensor, weights_N: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> tuple[Tensor, Tensor]:
    """Return Σ_n w_n · CE(softmax(head.logits(h_n)), y_n), differentiable in hidden states and head, and each CE.

    Args:
        hidden_ND: any float dtype.
        head: trained or frozen; its matrix may be the embedding (tied).
        targets_N: int64 ids in 0..V-1.
        weights_N: float; a position of weight 0 gives neither loss nor gradient, whatever its target and hidden state.
        chunk_logits: most logits alive at once, but one row at least.

    Returns:
        the sum in nats, fp32 (fp64 for fp64), whose gradient can be taken once and not differentiated; and the
        cross-entropies (N,) without gradient, 0 where a position is ignored.
    """
    # Zeroed, not dropped: to learn how many rows are left, the host would wait for the device.
    kept_N = weights_N != 0
    hidden_ND, targets_N = torch.where(kept_N[:, None], hidden_ND, 0.0), torch.where(kept_N, targets_N, 0)
    if not torch.is_grad_enabled():  # an autograd Function would compute its gradients even so
        losses_N = torch.where(kept_N, cross_entropies(hidden_ND, head, targets_N, chunk_logits), 0.0)
        return torch.dot(losses_N, weights_N.to(losses_N.dtype)), losses_N
    inputs = (head.scaled(hidden_ND), head.weight, head.bias, head.softcap, targets_N, weights_N)
    return _LinearCrossEntropy.apply(*inputs, compute_dtype(hidden_ND), chunk_logits)


@torch.no_grad()
def cross_entropies(hidden_ND: Tensor, head: Head, targets_N: Tensor, chunk_logits: int = CHUNK_LOGITS) -> Tensor:
    """Return each position's cross-entropy (N,), without gradient; arguments as in `linear_cross_entropy`."""
    chunks = _chunks(head.scaled(hidden_ND).to(compute_dtype(hidden_ND)), head, targets_N, chunk_logits)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return torch.cat([losses_R for _, losses_R, _, _ in chunks])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, bias_V, softcap, targets_N, weights_N, compute, chunk_logits):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the weighted sum and each loss (N,), and save the finished gradients, in the inputs' dtypes."""
        loss_dtype = torch.promote_types(compute, torch.float32)
        product_dtype = sum_dtype(compute)
        leaves = (hidden_ND, weight_VD, bias_V)
        sums = [
            leaf.new_empty(leaf.shape, dtype=loss_dtype) if wanted else None
            for leaf, wanted in zip(leaves, ctx.needs_input_grad[:3], strict=True)
        ]
        grad_hidden_ND, grad_weight_VD, grad_bias_V = sums
        weights_N, losses_N = weights_N.to(loss_dtype), hidden_ND.new_empty(len(hidden_ND), dtype=loss_dtype)
        chunks = _chunks(hidden_ND.to(compute), Head(weight_VD, bias_V, softcap), targets_N, chunk_logits)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part, losses_N[part], grads_RV, total_R in chunks:
                share_R = weights_N[part] / total_R
                shared_RD = (hidden_ND[part] * share_R[:, None]).to(product_dtype)
                for columns in column_slices(len(weight_VD)):
                    grads_RC = grads_RV[:, columns].to(product_dtype)
                    if grad_hidden_ND is not None:
                        part_CD = weight_VD[columns].to(product_dtype)
                        write_product(grad_hidden_ND[part], grads_RC, part_CD, add=columns.start > 0)
                    if grad_weight_VD is not None:
                        write_product(grad_weight_VD[columns], grads_RC.t(), shared_RD, add=part.start > 0)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[part] *= share_R[:, None]
                if grad_bias_V is not None:
                    torch.addmv(grad_bias_V, grads_RV.t(), share_R, beta=min(part.start, 1), out=grad_bias_V)
        made = (None if each is None else each.to(leaf.dtype) for each, leaf in zip(sums, leaves, strict=True))
        ctx.save_for_backward(*made)
        ctx.mark_non_differentiable(losses_N)
        losses_N.masked_fill_(weights_N == 0, 0.0)
        return torch.dot(losses_N, weights_N), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, _):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place: nobody else has the buffers, and the matrix's is as large as the head. Autograd refuses a second
        # backward, since it sees that saved tensors changed.
        saved = ctx.saved_tensors
        grads = [grad for grad in saved if grad is not None]
        # Reading grad_loss is free on a CPU; for a device the host would wait.
        if grad_loss.device.type == "cpu" and grad_loss == 1:
            torch.autograd.graph.increment_version(grads)
        else:
            for grad in grads:
                grad.mul_(grad_loss)
        return *saved, None, None, None, None, None


def _chunks(
    hidden_ND: Tensor, head: Head, targets_N: Tensor, chunk_logits: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield for each chunk its slice, CE (R,), total · ∂CE/∂z (R, V) and total (R,), as from `_softmax_gradient_`."""
    for part, z_RV in logit_chunks(hidden_ND, head.weight, chunk_logits, 1 / (head.softcap or 1.0)):
        targets_R1 = targets_N[part, None]
        results = [_softmax_gradient_(z_RV[rows], targets_R1[rows], head) for rows in cached_rows(z_RV)]
        losses_R, total_R = (torch.cat(parts) for parts in zip(*results, strict=True))
        yield part, losses_R, z_RV, total_R


def _softmax_gradient_(z_RV: Tensor, targets_R1: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Turn W h (divided by the softcap) into total · ∂CE/∂z; return CE (R,) and total (R,) = Σ exp(logit − highest)."""
    if head.bias is not None:
        z_RV.add_(head.bias, alpha=1 / (head.softcap or 1.0))
    exp_RV = z_RV if head.softcap is None else z_RV.tanh_() * head.softcap
    exp_RV -= exp_RV.amax(dim=1, keepdim=True)
    own_R1 = exp_RV.gather(1, targets_R1)
    total_R1 = exp_RV.exp_().sum(dim=1, keepdim=True)
    losses_R1 = total_R1.log() - own_R1
    # p − 1 by expm1: where p is nearly 1, subtracting would lose all digits.
    exp_RV.scatter_(1, targets_R1, torch.expm1(-losses_R1) * total_R1)
    if head.softcap is not None:
        torch.addcmul(exp_RV, exp_RV, z_RV.square_(), value=-1, out=z_RV)  # ∂logit/∂z = 1 − tanh²
    return losses_R1[:, 0], total_R1[:, 0]
