"""Rows of unequal length become rectangular batches, one by one or a whole validation set at once.

Plain padding attends nothing, is attended by nothing and is never supervised: it changes no number. With
`supervise_padding` (LLaDA's recipe: GUIDELINES.md of ML-GSAI/LLaDA, "SFT") padding is EOS, attended and supervised, so
the model learns where to stop; how much of it there is then matters, and the caller chooses `length` for that.

Shape suffixes: B rows, L positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from unmask.batch import Batch
from unmask.config.data import rounded_up
from unmask.data.encode import Encode, EncodedRow, count_dropped, count_notes
from unmask.data.sources import Rows
from unmask.errors import DataError
from unmask.ops.padding import padded
from unmask.rng import generator


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
    """Return the B rows as one micro-batch, padded on the right to `length`, L; none of them is longer.

    Args:
        sample_ids, slots, epoch, global_rows: as in `Batch`.
        pad_token_id: what fills the rows up; EOS where padding is supervised.
        supervise_padding: padding is attended and supervised.
        peers: sample ids of the rows that all ranks hold in this micro-batch.
    """
    input_ids_BL, present_BL = padded([row.input_ids for row in rows], pad_token_id, length)
    supervised_BL, _ = padded([row.supervised for row in rows], supervise_padding, length)
    return Batch(
        input_ids_BL=input_ids_BL,
        supervised_BL=supervised_BL,
        attention_mask_BL=present_BL | supervise_padding,
        answer_lengths_B=supervised_BL.sum(dim=1),
        sample_ids_B=torch.tensor(sample_ids, dtype=torch.int64),
        epoch=epoch,
        slots_B=torch.tensor(slots, dtype=torch.int64),
        global_rows=global_rows,
        cut_B=torch.tensor([row.cut for row in rows], dtype=torch.bool),
        peers_P=torch.tensor(peers, dtype=torch.int64),
    )


@dataclass(frozen=True)
class ValidationSet:
    """A validation set, encoded once; `dropped`, `noted` and `examples` as in `TrainLoader`."""

    batches: Sequence[Batch]
    dropped: Mapping[str, int]
    noted: Mapping[str, int]
    examples: Mapping[str, str]


def validation_set(
    rows: Rows,
    encode: Encode,
    *,
    local_batch_size: int,
    pad_token_id: int,
    supervise_padding: bool,
    seq_length: int | None = None,
) -> ValidationSet:
    """Return a whole validation set as batches, always the same ones; arguments as in `TrainLoader`.

    Rows are sorted by length for little padding. With `supervise_padding` all are padded to the longest row of the set,
    so that the loss does not depend on `local_batch_size`.

    Raises:
        DataError: a malformed row, or no row that can be scored.
    """
    encoded: list[tuple[int, EncodedRow]] = []
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for index in range(len(rows)):
        row = encode(index, 0)
        if isinstance(row, EncodedRow):
            encoded.append((index, row))
        else:
            count_dropped(index, row, rows, dropped, examples)
    if not encoded:
        raise DataError(
            f"validation_dataset: none of its {len(rows)} rows has a supervised token within seq_length; raise it"
        )
    count_notes(encoded, rows, noted, examples)
    encoded.sort(key=lambda item: (len(item[1]), item[0]))
    slots = generator(0, "data/slots/validation").permutation(len(encoded)).tolist()
    batches = [
        collate(
            [row for _, row in some],
            [sample_id for sample_id, _ in some],
            slots[first : first + local_batch_size],
            epoch=0,
            global_rows=len(encoded),
            length=len(encoded[-1][1]) if supervise_padding else rounded(len(some[-1][1]), seq_length),
            pad_token_id=pad_token_id,
            supervise_padding=supervise_padding,
            peers=[sample_id for sample_id, _ in some],
        )
        for first in range(0, len(encoded), local_batch_size)
        for some in [encoded[first : first + local_batch_size]]
    ]
    return ValidationSet(batches, dropped, noted, examples)
