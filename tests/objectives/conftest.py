"""Rows to corrupt, and a network that is cheap to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from unmask.batch import Batch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        )

    return make
