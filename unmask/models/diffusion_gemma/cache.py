"""What the encoder leaves for the decoder: keys and values of clean tokens, layer by layer.

Shapes: B rows, S columns, G key/value heads, E head size (both differ between kinds of layers), D width, K canvases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Position of a padding column: after everything, so that neither causal attention nor a canvas ever sees it.
HIDDEN = 2**40


@dataclass(frozen=True)
class Encoded:
    """Clean tokens as the decoder sees them.

    Attributes:
        keys, values: one (B, G, S, E) a layer.
        hidden_BLD: final hidden states, normed, of the tokens encoded last.
        positions_BS: int64, position of each column; `HIDDEN` at padding.
        lengths_B: int64, tokens of each row, which is where its next canvas starts.
        aligned: whether column s holds position s or padding in every row, so that columns can be cut by position.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden_BLD: Tensor
    positions_BS: Tensor
    lengths_B: Tensor
    aligned: bool

    def take(self, rows_K: Tensor) -> Encoded:
        """Return the rows `rows_K` (int64 indices or a bool mask), in that order."""
        return Encoded(
            tuple(keys[rows_K] for keys in self.keys),
            tuple(values[rows_K] for values in self.values),
            self.hidden_BLD[rows_K],
            self.positions_BS[rows_K],
            self.lengths_B[rows_K],
            self.aligned,
        )

    def first(self, lengths: Sequence[int]) -> Encoded:
        """Return the first `lengths[b]` tokens of each row b, what follows them as padding; columns that none has go.

        Args:
            lengths: one a row, on the host; column s must hold position s up to there.
        """
        columns = max(lengths)
        lengths_B = torch.tensor(lengths, device=self.lengths_B.device)
        positions_S = torch.arange(columns, device=lengths_B.device)
        return Encoded(
            tuple(keys[:, :, :columns] for keys in self.keys),
            tuple(values[:, :, :columns] for values in self.values),
            self.hidden_BLD.new_empty(len(lengths), 0, self.hidden_BLD.shape[-1]),  # a slice would keep the whole
            torch.where(positions_S < lengths_B[:, None], positions_S, HIDDEN),
            lengths_B,
            True,
        )

    def join(self, more: Encoded) -> Encoded:
        """Return these rows and those of `more` behind them; both `aligned`, the shorter padded on the right."""
        columns = max(self.positions_BS.shape[1], more.positions_BS.shape[1])

        def joined(old_BGSE: Tensor, new_BGSE: Tensor) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, 0, columns - part.shape[2])) for part in (old_BGSE, new_BGSE)])

        positions = [
            F.pad(part, (0, columns - part.shape[1]), value=HIDDEN) for part in (self.positions_BS, more.positions_BS)
        ]
        return Encoded(
            tuple(joined(*pair) for pair in zip(self.keys, more.keys, strict=True)),
            tuple(joined(*pair) for pair in zip(self.values, more.values, strict=True)),
            self.hidden_BLD.new_empty(len(positions[0]) + len(positions[1]), 0, self.hidden_BLD.shape[-1]),
            torch.cat(positions),
            torch.cat((self.lengths_B, more.lengths_B)),
            self.aligned and more.aligned,
        )

    def grown(self, rows: Sequence[int], more: Encoded, tokens: int, lengths: Sequence[int]) -> Encoded:
        """Return this with further tokens of some rows, each row's right behind those that it has.

        Args:
            rows: the rows that grow.
            more: their encoding, row k of it for `rows[k]`; its last `tokens` columns are the further tokens.
            tokens: how many further tokens each of them has.
            lengths: tokens of every row of this before, on the host; column s must hold position s up to there.
        """
        device = self.lengths_B.device
        after = [length + (tokens if row in rows else 0) for row, length in enumerate(lengths)]
        rows_K1 = torch.tensor(rows, device=device)[:, None]
        starts_K1 = torch.tensor([lengths[row] for row in rows], device=device)[:, None]
        at = (rows_K1, starts_K1 + torch.arange(tokens, device=device))

        def joined(old_BGSE: Tensor, new_KGSE: Tensor) -> Tensor:
            rows, heads, columns, size = old_BGSE.shape
            whole = old_BGSE.new_zeros(rows, heads, max(after), size)
            whole[:, :, :columns] = old_BGSE[:, :, : max(after)]
            whole.transpose(1, 2)[at] = new_KGSE[:, :, -tokens:].transpose(1, 2)
            return whole

        keys = tuple(joined(old, new) for old, new in zip(self.keys, more.keys, strict=True))
        values = tuple(joined(old, new) for old, new in zip(self.values, more.values, strict=True))
        return Encoded(keys, values, self.hidden_BLD, self.positions_BS, self.lengths_B, True).first(after)

    def detach(self) -> Encoded:
        """Return the same keys and values without their history; hidden states keep theirs."""
        return Encoded(
            tuple(keys.detach() for keys in self.keys),
            tuple(values.detach() for values in self.values),
            self.hidden_BLD,
            self.positions_BS,
            self.lengths_B,
            self.aligned,
        )


def causal_mask(past_BS: Tensor | None, positions_BL: Tensor, columns_BL: Tensor, window: int | None) -> Tensor:
    """Return which keys each encoder query sees, bool (B or 1, 1, L, S + L).

    Args:
        past_BS: positions of the columns encoded before, or None.
        positions_BL: position of each new token, at padding any.
        columns_BL: the same with `HIDDEN` at padding.
        window: W, a query sees keys with q − k < W; None = all before it.
    """
    keys_BS = columns_BL if past_BS is None else torch.cat((past_BS, columns_BL.expand(len(past_BS), -1)), dim=1)
    # Comparisons alone: a difference would take eight bytes a pair, and there are L · (S + L) of them.
    queries_BL1, keys_B1S = positions_BL[:, :, None], keys_BS[:, None, :]
    seen_BLS = keys_B1S <= queries_BL1
    if window is not None:
        seen_BLS &= keys_B1S > queries_BL1 - window
    # A padding query sees itself, so that its softmax is not empty; nothing looks at what comes of it.
    seen_BLS.diagonal(keys_BS.shape[1] - positions_BL.shape[1], dim1=1, dim2=2).fill_(True)
    return seen_BLS[:, None]


def canvas_sight(positions_KS: Tensor, starts_K: Tensor, window: int | None) -> Tensor:
    """Return which clean columns the canvas that starts at `starts_K` sees, bool (K, S): those before it.

    Args:
        positions_KS: positions of the columns.
        starts_K: position of each canvas's first token.
        window: W of a sliding layer: the last W − 1 tokens before the canvas, the same for all of its queries.
    """
    distance_KS = starts_K[:, None] - positions_KS
    seen_KS = distance_KS > 0
    return seen_KS if window is None else seen_KS & (distance_KS < window)
