"""The surest token of many positions, by tiles of the vocabulary, for the settings that ask for no more.

A batch has hundreds of open positions. The product weight · hiddenᵀ, vocabulary first, is then several times faster in
bf16 on a CPU than hidden · weightᵀ: the smaller matrix is the one that is packed anew for the kernel. A tile of it is
widened to fp32 and reduced while it is in the cache, to a maximum and a sum of exponentials relative to it (Milakov &
Gimelshein 2018, arXiv 1805.02867); what stays are the logits in bf16, in which the winners are looked up.

Shapes: M positions, P of a part, D width, V vocabulary rows, W those of a tile, K those of a block, J blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.ops.categorical import BLOCK
from unmask.sampling.engine.scratch import Scratch
from unmask.tiles import exp_

# From how many positions on the product is faster vocabulary first; the most that are made at once; and what they are
# padded to a multiple of, as other numbers take up to twice as long (measured on a Xeon with AMX and an EPYC with
# AVX512_BF16, 126,464 rows of 512).
FEWEST, MOST, MULTIPLE = 64, 256, 32
# Rows of a tile; with 256 positions it is 4 MiB in fp32. Whole blocks.
_TILE = 8 * BLOCK
# exp of logits whose largest is no further from 0 than this needs nothing subtracted, and loses no digits by that.
_NEAR = 8.0
# Logits that are bounded by this are finite: less than half of the largest number of bf16, and of fp32.
_FINITE = 1.5e38


@dataclass(frozen=True)
class Surest:
    """What a head says of M positions.

    Attributes:
        finite_M: bool, whether all logits are finite; where not, nothing else is of use.
        token_M: int64, the most likely token that is not banned, the first one where several are.
        confidence_M: float32, its probability among those.
        total_M: float32, logsumexp of the logits that are not banned.
    """

    finite_M: Tensor
    token_M: Tensor
    confidence_M: Tensor
    total_M: Tensor


class TiledHead:
    """Finds surest tokens, working in memory that it keeps.

    Args:
        banned: tokens that are never taken.
        vocab_size: rows from there on are padding, banned as well.
    """

    def __init__(self, banned: Sequence[int], vocab_size: int) -> None:
        self.banned, self.vocab_size = banned, vocab_size
        self._logits, self._floats = Scratch(), Scratch()
        self._largest: tuple[Tensor, Tensor] | None = None  # a head, and the largest magnitude in it

    @staticmethod
    def pays(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> bool:
        """Say whether this way is the faster one, and computes the very logits that the head would."""
        narrow = hidden_MD.dtype == weight_VD.dtype == torch.bfloat16
        return narrow and bias_V is None and hidden_MD.device.type == "cpu" and len(hidden_MD) >= FEWEST

    def __call__(self, hidden_MD: Tensor, weight_VD: Tensor) -> Surest:
        """Return the surest tokens of softmax(W h) of hidden states, M ≥ 1, in the weight's dtype."""
        if self._largest is None or self._largest[0] is not weight_VD:
            low, high = torch.aminmax(weight_VD)  # ten times faster than a norm on a CPU
            self._largest = weight_VD, torch.maximum(-low, high).float()
        # |w · h| is at most this, so that logits need not be looked at; a nan is below nothing.
        bounded = bool(self._largest[1] * hidden_MD.float().abs().sum(dim=1).max() < _FINITE)
        found = [self._part(hidden_PD, weight_VD, bounded) for hidden_PD in hidden_MD.split(part_sizes(len(hidden_MD)))]
        return Surest(*(torch.cat([getattr(part, field.name) for part in found]) for field in fields(Surest)))

    def _part(self, hidden_PD: Tensor, weight_VD: Tensor, bounded: bool) -> Surest:
        given, vocabulary = len(hidden_PD), len(weight_VD)
        hidden_DP = F.pad(hidden_PD, (0, 0, 0, _rounded(given) - given)).t().contiguous()
        positions = hidden_DP.shape[1]
        logits_VP = self._logits.rows(vocabulary, positions, like=hidden_PD)
        floats_WP = self._floats.rows(min(_TILE, vocabulary), positions, like=hidden_PD, dtype=torch.float32)
        highest_JP = floats_WP.new_empty(-(-vocabulary // BLOCK), positions)
        tops, totals = [], []
        for start in range(0, vocabulary, _TILE):
            tile = slice(start, min(start + _TILE, vocabulary))
            torch.mm(weight_VD[tile], hidden_DP, out=logits_VP[tile])
            part_WP = floats_WP[: tile.stop - tile.start].copy_(logits_VP[tile])
            self._ban(part_WP, start)
            highest_jP = highest_JP[start // BLOCK : -(-tile.stop // BLOCK)]
            _block_maxima(part_WP, highest_jP)
            # A tile that is banned whole has nothing to be relative to.
            highest_P = highest_jP.amax(dim=0).clamp(min=torch.finfo(torch.float32).min)
            near = bool(highest_P.abs().max() <= _NEAR)
            tops.append(torch.zeros_like(highest_P) if near else highest_P)
            totals.append(exp_(part_WP if near else part_WP.sub_(highest_P)).sum(dim=0))
        top_P, block_P = highest_JP.max(dim=0)
        total_P = (torch.stack(totals) * (torch.stack(tops) - top_P).exp_()).sum(dim=0).log_()
        # A sum is finite where all are; a maximum would not show minus infinity.
        finite_P = torch.ones_like(block_P, dtype=torch.bool) if bounded else logits_VP.float().sum(dim=0).isfinite()
        token_P = self._found(logits_VP, block_P)
        confidence_P = (-total_P).exp_().clamp_(max=1)
        return Surest(finite_P[:given], token_P[:given], confidence_P[:given], (total_P + top_P)[:given])

    def _ban(self, logits_WP: Tensor, start: int) -> None:
        """Put -inf for what is banned of the rows from `start` on."""
        logits_WP[max(0, self.vocab_size - start) :] = -torch.inf
        for token in self.banned:
            if start <= token < start + len(logits_WP):
                logits_WP[token - start] = -torch.inf

    def _found(self, logits_VP: Tensor, block_P: Tensor) -> Tensor:
        """Return the first highest token of each position's block, int64 (P,)."""
        rows_KP = block_P * BLOCK + torch.arange(BLOCK, device=block_P.device)[:, None]
        beyond_KP = rows_KP >= min(self.vocab_size, len(logits_VP))
        inside_KP = logits_VP.gather(0, rows_KP.clamp(max=len(logits_VP) - 1)).float()
        banned = torch.tensor(self.banned, dtype=torch.long, device=block_P.device)
        inside_KP.masked_fill_(beyond_KP | torch.isin(rows_KP, banned), -torch.inf)
        return rows_KP.gather(0, inside_KP.max(dim=0).indices[None])[0]


def _block_maxima(logits_WP: Tensor, out_jP: Tensor) -> None:
    """Write the maximum of each `BLOCK` rows; the last block may be shorter."""
    whole = len(logits_WP) // BLOCK
    if whole:
        torch.amax(logits_WP[: whole * BLOCK].unflatten(0, (whole, BLOCK)), dim=1, out=out_jP[:whole])
    if whole < len(out_jP):
        torch.amax(logits_WP[whole * BLOCK :], dim=0, out=out_jP[whole])


def part_sizes(positions: int) -> list[int]:
    """Divide positions into parts of at most `MOST`, nearly alike; all but the last are multiples of `MULTIPLE`."""
    parts = -(-positions // MOST)
    groups = -(-positions // MULTIPLE)
    sizes = [MULTIPLE * (groups // parts + (part < groups % parts)) for part in range(parts)]
    return [*sizes[:-1], positions - sum(sizes[:-1])]


def _rounded(positions: int) -> int:
    return -(-positions // MULTIPLE) * MULTIPLE
