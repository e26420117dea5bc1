"""The surest token of many positions, by tiles of the vocabulary, for the settings that ask for no more.

A batch has hundreds of open positions. The product weight · hiddenᵀ, vocabulary first, is then several times faster in
bf16 on a CPU than hidden · weightᵀ: the smaller matrix is the one that is packed anew for the kernel. A tile of it is
reduced while it is in the cache, to a maximum and a sum of exponentials relative to it (Milakov & Gimelshein 2018,
arXiv 1805.02867).

Shapes: M positions, D width, V vocabulary rows, W those of a tile, K those of a block, J blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.sampling.categorical import BLOCK
from unmask.sampling.scratch import Scratch

# From how many positions on the product is faster vocabulary first (measured: AMX, 126,464 rows, widths 128 to 512).
FEWEST = 64
# Rows of a tile; with 256 positions it is 4 MiB in fp32. Whole blocks.
_TILE = 8 * BLOCK


@dataclass(frozen=True)
class Surest:
    """What a head says of M positions, without the logits.

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

    def __call__(self, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Surest:
        """Return the surest tokens of softmax(W h + b) of hidden states in the weight's dtype."""
        positions, tiles = len(hidden_MD), range(0, len(weight_VD), _TILE)
        hidden_DM = hidden_MD.t().contiguous()
        logits_VM = self._logits.rows(len(weight_VD), positions, like=hidden_MD)
        floats_WM = self._floats.rows(min(_TILE, len(weight_VD)), positions, like=hidden_MD, dtype=torch.float32)
        highest_JM = floats_WM.new_empty(-(-len(weight_VD) // BLOCK), positions)
        sums, tops, totals = [], [], []
        for start in tiles:
            tile = slice(start, min(start + _TILE, len(weight_VD)))
            torch.mm(weight_VD[tile], hidden_DM, out=logits_VM[tile])
            if bias_V is not None:
                logits_VM[tile] += bias_V[tile, None]
            part_WM = floats_WM[: tile.stop - tile.start].copy_(logits_VM[tile])
            sums.append(part_WM.sum(dim=0))
            self._ban(part_WM, start)
            highest_jM = highest_JM[start // BLOCK : -(-tile.stop // BLOCK)]
            _block_maxima(part_WM, highest_jM)
            # A tile that is banned whole has nothing to be relative to.
            tops.append(highest_jM.amax(dim=0).clamp(min=torch.finfo(torch.float32).min))
            totals.append(part_WM.sub_(tops[-1]).exp_().sum(dim=0))
        top_M = highest_JM.amax(dim=0)
        total_M = (torch.stack(totals) * (torch.stack(tops) - top_M).exp_()).sum(dim=0).log_()
        token_M = self._found(logits_VM, highest_JM.max(dim=0).indices)
        return Surest(torch.stack(sums).sum(dim=0).isfinite(), token_M, (-total_M).exp(), total_M + top_M)

    def _ban(self, logits_WM: Tensor, start: int) -> None:
        """Put -inf for what is banned of the rows from `start` on."""
        logits_WM[max(0, self.vocab_size - start) :] = -torch.inf
        for token in self.banned:
            if start <= token < start + len(logits_WM):
                logits_WM[token - start] = -torch.inf

    def _found(self, logits_VM: Tensor, block_M: Tensor) -> Tensor:
        """Return the first highest token of each position's block, int64 (M,)."""
        rows_KM = block_M * BLOCK + torch.arange(BLOCK, device=block_M.device)[:, None]
        beyond_KM = rows_KM >= min(self.vocab_size, len(logits_VM))
        inside_KM = logits_VM.gather(0, rows_KM.clamp(max=len(logits_VM) - 1)).float()
        banned = torch.tensor(self.banned, dtype=torch.long, device=block_M.device)
        inside_KM.masked_fill_(beyond_KM | torch.isin(rows_KM, banned), -torch.inf)
        return rows_KM.gather(0, inside_KM.max(dim=0).indices[None])[0]


def _block_maxima(logits_WM: Tensor, out_jM: Tensor) -> None:
    """Write the maximum of each `BLOCK` rows; the last block may be shorter."""
    whole = len(logits_WM) // BLOCK
    if whole:
        torch.amax(logits_WM[: whole * BLOCK].unflatten(0, (whole, BLOCK)), dim=1, out=out_jM[:whole])
    if whole < len(out_jM):
        torch.amax(logits_WM[whole * BLOCK :], dim=0, out=out_jM[whole])
