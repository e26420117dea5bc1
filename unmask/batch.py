"""The containers that flow from the data to the loss. Nothing here computes; everything is frozen.

Shape suffixes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of clean rows, padded to a common length.

    Attributes:
        input_ids_BL: clean token ids, int64.
        supervised_BL: bool, True where the loss may look (answers, and padding under `supervise_padding`).
        attention_mask_BL: bool, True = attend.
        answer_lengths_B: int64, supervised tokens of each row, padding included when it is supervised.
        sample_ids_B: int64, index of each row in its dataset: with `epoch` the key of its noise.
        epoch: which pass over the data this is, from 0.
        slots_B: int64, a random place of each row in its global batch, 0..global_rows-1, no two rows the same;
            stratified draws over the global batch use it.
        global_rows: rows in the global batch that this micro-batch is part of.
    """

    input_ids_BL: Tensor
    supervised_BL: Tensor
    attention_mask_BL: Tensor
    answer_lengths_B: Tensor
    sample_ids_B: Tensor
    epoch: int
    slots_B: Tensor
    global_rows: int


@dataclass(frozen=True)
class NoisyBatch:
    """A corrupted micro-batch, ready for the network.

    Attributes:
        clean: the batch it was made from.
        noisy_ids_BL: int64, what the network sees.
        attention_mask_BL: bool, True = attend; None when the batch has no padding, so that attention needs no mask.
        scored_BL: bool, positions whose prediction enters the loss.
        positions_N: int64, the same positions as indices into the flattened (B·L) batch; known on the CPU, so that the
            gather before the head does not wait for the device to count them.
        weights_BL: float32, weight of each scored position's cross-entropy (0 elsewhere).
        counts: for each loss term, the local count that its sum is to be divided by once summed over all
            micro-batches and ranks. Known before the network runs, so that one division is exact.
    """

    clean: Batch
    noisy_ids_BL: Tensor
    attention_mask_BL: Tensor | None
    scored_BL: Tensor
    positions_N: Tensor
    weights_BL: Tensor
    counts: Mapping[str, float]

    def to(self, device: object) -> NoisyBatch:
        """Return the same batch with every tensor on `device`; the copies do not block."""
        return _moved(self, device)


@dataclass(frozen=True)
class LossTerm:
    """A sum over local positions and the count it is to be divided by after global summation.

    Attributes:
        sum: scalar tensor with gradient, nats.
        count: local count; the same number as in `NoisyBatch.counts`.
        weight: factor of this term in the total loss.
    """

    sum: Tensor
    count: float
    weight: float = 1.0


@dataclass(frozen=True)
class LossTerms:
    """The terms of one objective on one micro-batch, by name; the total is Σ weight · sum / global count."""

    terms: Mapping[str, LossTerm] = field(default_factory=dict)


def _moved(container: Any, device: object) -> Any:
    import dataclasses

    from torch import Tensor

    changes = {}
    for item in dataclasses.fields(container):
        value = getattr(container, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value.to(device, non_blocking=True)  # pyright: ignore[reportCallIssue, reportArgumentType]
        elif dataclasses.is_dataclass(value):
            changes[item.name] = _moved(value, device)
    return dataclasses.replace(container, **changes)
