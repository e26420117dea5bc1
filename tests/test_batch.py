"""The containers: frozen, and moved whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from unmask.batch import Batch, CanvasBatch, NoisyBatch

IDS = torch.arange(6).view(2, 3)
FLAGS = IDS > 2


def clean() -> Batch:
    samples, cut = torch.tensor([4, 9]), torch.tensor([False, True])
    return Batch(IDS, FLAGS, ~FLAGS, FLAGS.sum(1), samples, 1, torch.tensor([1, 0]), 2, cut, torch.tensor([4, 9, 3]))


def noisy(mask: Tensor | None) -> NoisyBatch:
    positions = FLAGS.flatten().nonzero()[:, 0]
    return NoisyBatch(clean(), IDS + 1, mask, FLAGS, positions, FLAGS.float(), torch.ones(3), {"mdlm": 3.0})


def canvases(rows: Tensor | None, conditioned: Tensor | None) -> CanvasBatch:
    """Two canvases of three positions."""
    weight, starts = (None, ()) if conditioned is None else (conditioned.float(), (1,))
    positions = torch.tensor([0, 1, 3])
    return CanvasBatch(
        clean(), IDS, positions, IDS.flatten()[positions], rows, (1, 2), torch.tensor([1, 2]), IDS + 1, IDS, FLAGS,
        None, torch.ones(2), conditioned, starts, weight, {"diffusion": 3.0, "encoder": 3.0},
    )  # fmt: skip


@pytest.mark.parametrize(
    "batch",
    [
        noisy(None),
        noisy(torch.ones(2, 3, dtype=torch.bool)),
        canvases(None, None),
        canvases(torch.tensor([0, 0]), torch.tensor([1])),
    ],
    ids=["masked", "masked and padded", "canvases", "canvases of one row"],
)
def test_to_moves_every_tensor_and_keeps_the_rest(batch: NoisyBatch | CanvasBatch) -> None:
    moved = batch.to("meta")

    def check(before: object, after: object) -> None:
        assert type(before) is type(after)
        for field in dataclasses.fields(before):  # type: ignore[arg-type]
            old, new = getattr(before, field.name), getattr(after, field.name)
            if isinstance(old, Tensor):
                assert new.device.type == "meta" and old.device.type == "cpu"
                assert (new.shape, new.dtype) == (old.shape, old.dtype)
            elif dataclasses.is_dataclass(old):
                check(old, new)
            else:
                assert new == old

    check(batch, moved)
    assert torch.equal(batch.to("cpu").clean.sample_ids_B, torch.tensor([4, 9]))


def test_frozen() -> None:
    for batch in (noisy(None), canvases(None, None)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            batch.counts = {}  # type: ignore[misc]
