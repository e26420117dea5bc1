"""What the encoder leaves for the decoder: keys and values of clean tokens, layer by layer.

Shapes: B rows, S columns, G key/value heads, E head size (both differ between kinds of layers), D width, K some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Position of a padding column: after everything, so that neither causal attention nor a canvas ever sees it.
PADDING_POSITION = 2**40


@dataclass(frozen=True)
class Encoded:
    """Clean tokens as the decoder sees them.

    Attributes:
        keys, values: one (B, G, S, E) a layer.
        hidden_BLD: final hidden states, normed, of the tokens encoded last.
        positions_BS: int64, position of each column; `PADDING_POSITION` at padding.
        lengths_B: int64, tokens of each row, which is where its next canvas starts.
        aligned: whether column s holds position s or padding in every row, so that columns can be cut by position.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden_BLD: Tensor
    positions_BS: Tensor
    lengths_B: Tensor
    aligned: bool

    def select(self, rows_K: Tensor) -> Encoded:
        """Return the rows `rows_K` (int64 indices or a bool mask), in that order."""
        others = {name: getattr(self, name)[rows_K] for name in ("hidden_BLD", "positions_BS", "lengths_B")}
        return self._layers(lambda stored_BGSE: stored_BGSE[rows_K], **others)

    def truncate(self, lengths: Sequence[int]) -> Encoded:
        """Return the first `lengths[b]` tokens of each row b, what follows them as padding; columns that none has go.

        Args:
            lengths: one a row, on the host; column s must hold position s up to there.
        """
        columns = max(lengths)
        lengths_B = torch.tensor(lengths, device=self.lengths_B.device)
        positions_S = torch.arange(columns, device=lengths_B.device)
        return self._layers(
            lambda stored_BGSE: stored_BGSE[:, :, :columns],
            hidden_BLD=self._no_hidden(len(lengths)),
            positions_BS=torch.where(positions_S < lengths_B[:, None], positions_S, PADDING_POSITION),
            lengths_B=lengths_B,
            aligned=True,
        )

    def concat(self, more: Encoded) -> Encoded:
        """Return these rows and those of `more` behind them; both `aligned`, the shorter padded on the right."""
        columns = max(self.positions_BS.shape[1], more.positions_BS.shape[1])
        positions = [
            F.pad(part, (0, columns - part.shape[1]), value=PADDING_POSITION)
            for part in (self.positions_BS, more.positions_BS)
        ]
        return self._layers(
            lambda *both: torch.cat([F.pad(part, (0, 0, 0, columns - part.shape[2])) for part in both]),
            more,
            hidden_BLD=self._no_hidden(sum(map(len, positions))),
            positions_BS=torch.cat(positions),
            lengths_B=torch.cat((self.lengths_B, more.lengths_B)),
            aligned=self.aligned and more.aligned,
        )

    def append(self, rows: Sequence[int], more: Encoded, tokens: int, lengths: Sequence[int]) -> Encoded:
        """Return this with further tokens of some rows, each row's right behind those that it has.

        Args:
            rows: the rows that grow.
            more: their encoding, row k of it for `rows[k]`; its last `tokens` columns are the further tokens.
            tokens: how many further tokens each of them has.
            lengths: tokens of every row of this before, on the host; column s must hold position s up to there.
        """
        device = self.lengths_B.device
        after = [length + (tokens if row in rows else 0) for row, length in enumerate(lengths)]
        starts_K1 = torch.tensor([lengths[row] for row in rows], device=device)[:, None]
        places = (torch.tensor(rows, device=device)[:, None], starts_K1 + torch.arange(tokens, device=device))

        def grown(old_BGSE: Tensor, new_KGSE: Tensor) -> Tensor:
            whole_BGSE = F.pad(old_BGSE, (0, 0, 0, max(after) - old_BGSE.shape[2]))  # a negative number cuts
            whole_BGSE.transpose(1, 2)[places] = new_KGSE[:, :, -tokens:].transpose(1, 2)
            return whole_BGSE

        return self._layers(grown, more).truncate(after)

    def detach(self) -> Encoded:
        """Return the same keys and values without their history; hidden states keep theirs."""
        return self._layers(Tensor.detach)

    take, first, join, grown = select, truncate, concat, append  # until sampling says so

    def _layers(self, change: Callable[..., Tensor], *others: Encoded, **fields: Any) -> Encoded:
        keys = tuple(map(change, self.keys, *(other.keys for other in others)))
        values = tuple(map(change, self.values, *(other.values for other in others)))
        return replace(self, keys=keys, values=values, **fields)

    def _no_hidden(self, rows: int) -> Tensor:
        """Return hidden states of no token; a slice would keep the whole in memory."""
        return self.hidden_BLD.new_empty(rows, 0, self.hidden_BLD.shape[-1])
