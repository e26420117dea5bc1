"""The containers: frozen, and moved whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from unmask.batch import Batch, LossTerms, NoisyBatch


def noisy(mask: Tensor | None) -> NoisyBatch:
    ids = torch.arange(6).view(2, 3)
    flags = ids > 2
    clean = Batch(ids, flags, ~flags, flags.sum(1), torch.tensor([4, 9]), 1, torch.tensor([1, 0]), 2)
    positions = flags.flatten().nonzero()[:, 0]
    return NoisyBatch(clean, ids + 1, mask, flags, positions, flags.float(), {"mdlm": 3.0})


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3, dtype=torch.bool)])
def test_to_moves_every_tensor_and_keeps_the_rest(mask: Tensor | None) -> None:
    batch = noisy(mask)
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
    with pytest.raises(dataclasses.FrozenInstanceError):
        noisy(None).counts = {}  # type: ignore[misc]
    assert LossTerms().terms == {}
