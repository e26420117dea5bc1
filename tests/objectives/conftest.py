"""Rows to corrupt, and a network that is cheap to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from unmask.batch import Batch


@pytest.fixture(scope="session")
def rows() -> Callable[..., Batch]:
    """Return a function that makes a batch: row n is sample n, with a prompt of three tokens before its answer.

    Padding (id 0) is attended and supervised as under `supervise_padding`, or neither.
    """

    def make(
        samples: Sequence[int],
        lengths: Sequence[int],
        *,
        padded_to: int | None = None,
        supervise_padding: bool = False,
        epoch: int = 0,
        slots: Sequence[int] | None = None,
        global_rows: int | None = None,
        cut: Sequence[bool] | None = None,
        peers: Sequence[int] | None = None,
    ) -> Batch:
        width = padded_to or max(lengths)
        position = torch.arange(width)[None]
        real = position < torch.tensor(lengths)[:, None]
        ids = torch.where(real, (torch.tensor(samples)[:, None] * 7 + position * 3) % 20 + 1, 0)
        supervised = (position >= 3) & (real | supervise_padding)
        return Batch(
            input_ids_BL=ids,
            supervised_BL=supervised,
            attention_mask_BL=real | supervise_padding,
            answer_lengths_B=supervised.sum(1),
            sample_ids_B=torch.tensor(samples),
            epoch=epoch,
            slots_B=torch.tensor(list(range(len(samples))) if slots is None else slots),
            global_rows=len(samples) if global_rows is None else global_rows,
            cut_B=torch.tensor([False] * len(samples) if cut is None else cut),
            peers_P=torch.tensor(samples if peers is None else peers),
        )

    return make


@pytest.fixture(scope="session")
def turns() -> Callable[..., Batch]:
    """Return a function that makes a batch of rows given as runs of (length, whether supervised).

    A token depends on its sample and position alone; ids 2..35, padding 0.
    """

    def make(
        rows: Sequence[Sequence[tuple[int, bool]]],
        *,
        samples: Sequence[int] | None = None,
        width: int | None = None,
        cut: Sequence[bool] | None = None,
        epoch: int = 0,
        slots: Sequence[int] | None = None,
        global_rows: int | None = None,
        peers: Sequence[int] | None = None,
    ) -> Batch:
        samples = list(range(len(rows)) if samples is None else samples)
        lengths = torch.tensor([sum(length for length, _ in runs) for runs in rows])
        position = torch.arange(width or int(lengths.max()))[None]
        real = position < lengths[:, None]
        supervised = torch.zeros_like(real)
        for number, runs in enumerate(rows):
            flags = [flag for length, flag in runs for _ in range(length)]
            supervised[number, : len(flags)] = torch.tensor(flags)
        mixed = torch.tensor(samples)[:, None] * 7 + position * position * 5 + position * 3
        return Batch(
            input_ids_BL=torch.where(real, mixed % 34 + 2, 0),
            supervised_BL=supervised,
            attention_mask_BL=real,
            answer_lengths_B=supervised.sum(1),
            sample_ids_B=torch.tensor(samples),
            epoch=epoch,
            slots_B=torch.tensor(list(range(len(rows)) if slots is None else slots)),
            global_rows=len(rows) if global_rows is None else global_rows,
            cut_B=torch.tensor([False] * len(rows) if cut is None else cut),
            peers_P=torch.tensor(samples if peers is None else list(peers)),
        )

    return make
