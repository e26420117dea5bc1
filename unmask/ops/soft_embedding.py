"""softmax(logits) @ embedding, made a tile of the vocabulary at a time: neither logits nor softmax ever exist whole.

The logits count as constants, but the embedding that they mix does not: its gradient is taken.

Shapes: N positions, D width, V vocabulary, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.ops.head import Head
from unmask.products import add_product, write_product
from unmask.tiles import SMALL_CAP, tanh_, tile_rows, tiles, write_exp


def soft_embedding(hidden_ND: Tensor, head: Head) -> Tensor:
    """Return softmax(head.logits(h)) @ head.weight, (N, D) in the weight's dtype, differentiable in that weight alone.

    Args:
        hidden_ND: final hidden states; their own gradient is not taken.
        head: softcapped, its matrix the embedding; the gradient does not reach it through the logits.
    """
    assert head.softcap is not None
    kind = hidden_ND.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    return _SoftEmbedding.apply(hidden_ND.detach(), head.weight, head.softcap, compute)  # pyright: ignore[reportReturnType]


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, weight_VD, softcap, compute):  # noqa: ANN001
        """Return the mix; a large cap's sums follow the largest logit (Milakov & Gimelshein 2018)."""
        hidden_DN = hidden_ND.to(compute).t().contiguous()
        bounded = softcap <= SMALL_CAP
        # fp16, which ends at 65,504, does not hold sums over a vocabulary.
        products = torch.float32 if compute == torch.float16 else compute
        top_N = torch.full_like(hidden_DN[0], 0.0 if bounded else -softcap, dtype=torch.float32)
        total_N, mixed_ND = torch.zeros_like(top_N), torch.zeros(hidden_ND.shape, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for _, part_RD, scores_RN in _tiled(hidden_DN, weight_VD, softcap):
                if not bounded:
                    before_N, top_N = top_N, torch.maximum(top_N, scores_RN.amax(dim=0).mul_(softcap))
                    lower_N = before_N.sub_(top_N).exp_()
                    total_N.mul_(lower_N)
                    mixed_ND.mul_(lower_N[:, None])
                shares_RN = write_exp(scores_RN, scores_RN, -top_N, softcap)
                total_N.add_(shares_RN.sum(dim=0))
                add_product(mixed_ND, shares_RN.to(products).t(), part_RD.to(products))
        ctx.save_for_backward(hidden_DN, weight_VD, top_N.add_(total_N.log()))
        ctx.softcap = softcap
        return (mixed_ND / total_N[:, None]).to(weight_VD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND):  # noqa: ANN001  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_DN, weight_VD, logsum_N = ctx.saved_tensors
        grad_VD = torch.zeros_like(weight_VD)
        grad_ND = grad_ND.to(hidden_DN.dtype)
        for part, _, scores_RN in _tiled(hidden_DN, weight_VD, ctx.softcap):
            shares_RN = write_exp(scores_RN, scores_RN, -logsum_N, ctx.softcap)
            add_product(grad_VD[part], shares_RN.to(hidden_DN.dtype), grad_ND)
        return None, grad_VD, None, None


def _tiled(hidden_DN: Tensor, weight_VD: Tensor, softcap: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each tile of the vocabulary, its rows in the compute dtype and tanh(z / c) of its z (R, N) in fp32.

    These lie where the next tile's are written.
    """
    vocabulary, positions = len(weight_VD), hidden_DN.shape[1]
    most = min(tile_rows(hidden_DN.device.type, positions), vocabulary)
    room_RN = hidden_DN.new_empty(most, positions, dtype=torch.float32)
    for part in tiles(vocabulary, most):
        part_RD = weight_VD[part].to(hidden_DN.dtype)
        scores_RN = write_product(room_RN[: len(part_RD)], part_RD, hidden_DN, 1 / softcap)
        yield part, part_RD, tanh_(scores_RN, softcap)
