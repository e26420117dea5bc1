"""Linear head and cross-entropy in one: the logits of a chunk of rows live, those of all rows never do.

The gradients with respect to hidden states, head and bias are computed in the forward pass, while a chunk's
probabilities are at hand (the idea of Liger's FusedLinearCrossEntropy, arXiv 2410.10989, section 3.2), so backward is a
multiplication by the incoming scalar. Matmuls run in autocast's dtype where it is on; softmax, loss and the sums of
gradients over chunks are fp32 (fp64 for fp64 inputs).

Shapes: N scored positions, D width, V vocabulary rows, R rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits alive at once. Larger chunks make faster matmuls, smaller ones less memory: 2^24 fp32 logits are 64 MiB.
CHUNK_LOGITS = 2**24
# With a compute dtype below the master weights', the head is cast a slice at a time, so no copy of it ever exists.
CAST_ROWS = 2**14


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


def _wide(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of what is summed: fp32, or fp64 where the inputs are."""
    return torch.promote_types(compute, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, bias_V, targets_N, weights_N, compute, chunk_logits, softcap):  # noqa: ANN001
        """Return the summed loss and save the finished gradients; arguments as in `linear_cross_entropy`."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        wide = {"dtype": _wide(compute), "device": hidden_ND.device}
        grad_weight_VD = torch.zeros(weight_VD.shape, **wide) if needs_weight else None
        grad_bias_V = torch.zeros(len(weight_VD), **wide) if needs_bias else None
        loss = torch.zeros((), **wide)
        weights_N = weights_N.to(loss.dtype)
        # Capped logits need their slope beside them, a second tensor of their size.
        rows = max(1, chunk_logits // (len(weight_VD) * (1 if softcap is None else 2)))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), rows):
                part = slice(start, start + rows)
                hidden_RD = hidden_ND[part].to(compute)
                logits_RV = _logits(hidden_RD, weight_VD, bias_V)
                slope_RV = None
                if softcap is not None:
                    logits_RV.div_(softcap).tanh_()
                    if needs_hidden or needs_weight or needs_bias:
                        slope_RV = torch.square(logits_RV).neg_().add_(1.0)
                    logits_RV.mul_(softcap)
                targets_R, weights_R = targets_N[part, None], weights_N[part, None]
                picked_R = logits_RV.gather(1, targets_R)
                top_R = logits_RV.amax(dim=1, keepdim=True)
                # exp in place: the logits become unnormalised probabilities, then the gradient of the logits.
                grad_RV = logits_RV.sub_(top_R).exp_()
                total_R = grad_RV.sum(dim=1, keepdim=True)
                loss += ((total_R.log() + top_R - picked_R) * weights_R).sum()
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                grad_RV.mul_(weights_R / total_R)
                grad_RV.scatter_add_(1, targets_R, -weights_R)
                if slope_RV is not None:
                    grad_RV.mul_(slope_RV)
                if grad_bias_V is not None:
                    grad_bias_V += grad_RV.sum(dim=0)
                _accumulate(grad_RV, hidden_RD, weight_VD, grad_hidden_ND, grad_weight_VD, part)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(bias_V.dtype)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place: the buffers are ours alone, and the head's is as large as the head. A second backward is refused by
        # autograd, which sees that saved tensors changed.
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def _slices(weight_VD: Tensor, compute: torch.dtype) -> list[slice]:
    """One slice when nothing is to be cast, else pieces small enough to cast one after another."""
    step = len(weight_VD) if weight_VD.dtype == compute == _wide(compute) else CAST_ROWS
    return [slice(start, start + step) for start in range(0, len(weight_VD), step)]


def _logits(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return wide logits (R, V), multiplied in the dtype of `hidden_RD`."""
    logits_RV = torch.empty(len(hidden_RD), len(weight_VD), dtype=_wide(hidden_RD.dtype), device=hidden_RD.device)
    for piece in _slices(weight_VD, hidden_RD.dtype):
        product = logits_RV[:, piece]
        matrix = weight_VD[piece].to(hidden_RD.dtype).t()
        if hidden_RD.dtype == logits_RV.dtype:
            torch.mm(hidden_RD, matrix, out=product) if product.is_contiguous() else product.copy_(hidden_RD @ matrix)
        else:
            product.copy_(hidden_RD @ matrix)
    return logits_RV if bias_V is None else logits_RV.add_(bias_V)


def _accumulate(
    grad_RV: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    grad_hidden_ND: Tensor | None,
    grad_weight_VD: Tensor | None,
    part: slice,
) -> None:
    """Add one chunk's gradients into the buffers of hidden states and head."""
    compute = hidden_RD.dtype
    grad_hidden_RD = torch.zeros(hidden_RD.shape, dtype=grad_RV.dtype, device=hidden_RD.device)
    for piece in _slices(weight_VD, compute):
        grad_RW = grad_RV[:, piece].to(compute)
        if grad_hidden_ND is not None:
            if compute == grad_hidden_RD.dtype:
                grad_hidden_RD.addmm_(grad_RW, weight_VD[piece].to(compute))
            else:
                grad_hidden_RD += grad_RW @ weight_VD[piece].to(compute)
        if grad_weight_VD is not None:
            if compute == grad_weight_VD.dtype:
                grad_weight_VD[piece].addmm_(grad_RW.t(), hidden_RD)
            else:
                grad_weight_VD[piece] += grad_RW.t() @ hidden_RD
    if grad_hidden_ND is not None:
        grad_hidden_ND[part] = grad_hidden_RD.to(grad_hidden_ND.dtype)
