"""Rows of encoded tokens selected, cut, joined and grown, as batches of canvases change while they are sampled.

Shapes: B rows, S columns, G key/value heads, E head size, D width, K some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.diffusion_gemma.model import PADDING_POSITION, Encoded


def select(encoded: Encoded, rows_K: Tensor) -> Encoded:
    """Return the rows `rows_K` (int64 indices or a bool mask), in that order."""
    others = {name: getattr(encoded, name)[rows_K] for name in ("hidden_BLD", "positions_BS", "lengths_B")}
    return _layers(lambda stored_BGSE: stored_BGSE[rows_K], encoded, **others)


def truncate(encoded: Encoded, lengths: Sequence[int]) -> Encoded:
    """Return the first `lengths[b]` tokens of each row b, what follows them as padding; columns that none has go.

    Column s must hold position s up to there; `lengths` lie on the host.
    """
    columns = max(lengths)
    lengths_B = torch.tensor(lengths, device=encoded.lengths_B.device)
    positions_S = torch.arange(columns, device=lengths_B.device)
    return _layers(
        lambda stored_BGSE: stored_BGSE[:, :, :columns],
        encoded,
        hidden_BLD=_no_hidden(encoded, len(lengths)),
        positions_BS=torch.where(positions_S < lengths_B[:, None], positions_S, PADDING_POSITION),
        lengths_B=lengths_B,
        aligned=True,
    )


def concat(encoded: Encoded, more: Encoded) -> Encoded:
    """Return the rows of one and those of the other behind them; both `aligned`, the shorter padded on the right."""
    columns = max(encoded.positions_BS.shape[1], more.positions_BS.shape[1])
    positions = [
        F.pad(part, (0, columns - part.shape[1]), value=PADDING_POSITION)
        for part in (encoded.positions_BS, more.positions_BS)
    ]
    return _layers(
        lambda *both: torch.cat([F.pad(part, (0, 0, 0, columns - part.shape[2])) for part in both]),
        encoded,
        more,
        hidden_BLD=_no_hidden(encoded, sum(map(len, positions))),
        positions_BS=torch.cat(positions),
        lengths_B=torch.cat((encoded.lengths_B, more.lengths_B)),
        aligned=encoded.aligned and more.aligned,
    )


def append(encoded: Encoded, rows: Sequence[int], more: Encoded, tokens: int, lengths: Sequence[int]) -> Encoded:
    """Return the same with further tokens of some rows, each row's right behind those that it has.

    Args:
        encoded: what is there; column s must hold position s up to each row's length.
        rows: the rows that grow.
        more: their encoding, row k of it for `rows[k]`; its last `tokens` columns are the further tokens.
        lengths: tokens of every row before, on the host.
    """
    device = encoded.lengths_B.device
    after = [length + (tokens if row in rows else 0) for row, length in enumerate(lengths)]
    starts_K1 = torch.tensor([lengths[row] for row in rows], device=device)[:, None]
    places = (torch.tensor(rows, device=device)[:, None], starts_K1 + torch.arange(tokens, device=device))

    def grown(old_BGSE: Tensor, new_KGSE: Tensor) -> Tensor:
        whole_BGSE = F.pad(old_BGSE, (0, 0, 0, max(after) - old_BGSE.shape[2]))  # new memory; a negative number cuts
        whole_BGSE.transpose(1, 2)[places] = new_KGSE[:, :, -tokens:].transpose(1, 2)
        return whole_BGSE

    return truncate(_layers(grown, encoded, more), after)


def _layers(change: Callable[..., Tensor], encoded: Encoded, *others: Encoded, **fields: Any) -> Encoded:
    """Return the first with changed keys and values, a function of those of all, and with other fields."""
    keys = tuple(map(change, encoded.keys, *(other.keys for other in others)))
    values = tuple(map(change, encoded.values, *(other.values for other in others)))
    return replace(encoded, keys=keys, values=values, **fields)


def _no_hidden(encoded: Encoded, rows: int) -> Tensor:
    """Return hidden states of no token; a slice would keep the whole in memory."""
    return encoded.hidden_BLD.new_empty(rows, 0, encoded.hidden_BLD.shape[-1])
