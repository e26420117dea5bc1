"""Rows of unequal length become one rectangular batch.

Plain padding attends nothing, is attended by nothing and is never supervised: it changes no number. With
`supervise_padding` (LLaDA's recipe: GUIDELINES.md of ML-GSAI/LLaDA, "SFT") padding is EOS, attended and supervised, so
the model learns where to stop; how much of it there is then matters, and the caller chooses `length` for that.

Shape suffixes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.batch import Batch, rounded_up
from unmask.data.encode import EncodedRow


def rounded(length: int, most: int | None) -> int:
    """Return the length up to which rows of at most `length` tokens are padded, itself at most `most`."""
    return rounded_up(length) if most is None else max(length, min(rounded_up(length), most))


def collate(
    rows: Sequence[EncodedRow],
    sample_ids: Sequence[int],
    slots: Sequence[int],
    epoch: int,
    global_rows: int,
    length: int,
    pad_token_id: int,
    supervise_padding: bool,
    peers: Sequence[int],
) -> Batch:
    """Return the rows as one micro-batch, padded on the right.

    Args:
        rows: B encoded rows, none longer than `length`.
        sample_ids: index of each in its dataset.
        slots: place of each in its global batch.
        epoch: pass over the data, from 0.
        global_rows: rows in the global batch.
        length: L.
        pad_token_id: what fills the rows up; EOS where padding is supervised.
        supervise_padding: padding is attended and supervised.
        peers: sample ids of the rows that all ranks hold in this micro-batch.
    """
    shape = len(rows), length
    input_ids_BL = torch.full(shape, pad_token_id, dtype=torch.int64)
    supervised_BL = torch.full(shape, supervise_padding)
    attention_mask_BL = torch.full(shape, supervise_padding)
    for number, row in enumerate(rows):
        input_ids_BL[number, : len(row)] = torch.from_numpy(row.input_ids)
        supervised_BL[number, : len(row)] = torch.from_numpy(row.supervised)
        attention_mask_BL[number, : len(row)] = True
    return Batch(
        input_ids_BL=input_ids_BL,
        supervised_BL=supervised_BL,
        attention_mask_BL=attention_mask_BL,
        answer_lengths_B=supervised_BL.sum(dim=1),
        sample_ids_B=torch.tensor(sample_ids, dtype=torch.int64),
        epoch=epoch,
        slots_B=torch.tensor(slots, dtype=torch.int64),
        global_rows=global_rows,
        cut_B=torch.tensor([row.cut for row in rows], dtype=torch.bool),
        peers_P=torch.tensor(peers, dtype=torch.int64),
    )
