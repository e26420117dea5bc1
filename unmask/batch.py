"""The containers that flow from the data to the loss; everything is frozen.

Shape suffixes: B rows, L positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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
        cut_B: bool, rows that lost their end to truncation, so that what follows their last token is unknown.
        peers_P: int64, sample ids of the rows that all ranks hold in this micro-batch, these ones among them; what
            every rank must decide alike (whether an optional pass runs) is a function of them.
    """

    input_ids_BL: Tensor
    supervised_BL: Tensor
    attention_mask_BL: Tensor
    answer_lengths_B: Tensor
    sample_ids_B: Tensor
    epoch: int
    slots_B: Tensor
    global_rows: int
    cut_B: Tensor
    peers_P: Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """A micro-batch with tokens hidden in place, ready for the network.

    Attributes:
        clean: the batch it was made from.
        noisy_ids_BL: int64, what the network sees.
        attention_mask_BL: bool, True = attend; None when the batch has no padding, so that attention needs no mask.
        scored_BL: bool, positions whose prediction enters the loss.
        positions_N: int64, the same positions as indices into the flattened (B·L) batch; known on the CPU, so that the
            gather before the head does not wait for the device to count them.
        weights_BL: float32, weight of each scored position's cross-entropy (0 elsewhere).
        levels_N: float32, the noise level at each of `positions_N`, in (0, 1].
        counts: for each loss term, the local count that its sum is to be divided by once summed over all
            micro-batches and ranks. Known before the network runs, so that one division is exact.
    """

    clean: Batch
    noisy_ids_BL: Tensor
    attention_mask_BL: Tensor | None
    scored_BL: Tensor
    positions_N: Tensor
    weights_BL: Tensor
    levels_N: Tensor
    counts: Mapping[str, float]

    def to(self, device: object) -> NoisyBatch:
        """Return the same batch with every tensor on `device`; the copies do not block."""
        return _moved(self, device)


@dataclass(frozen=True)
class CanvasBatch:
    """Clean rows for an encoder and one noisy canvas of each answer for a decoder.

    Shape suffixes: K canvases, C positions of a canvas, N next-token pairs, S canvases with self-conditioning.

    Attributes:
        clean: the batch it was made from.
        encoder_ids_BL: int64, clean rows, an answer at the end of its row filled up to whole canvases.
        encoder_positions_N: int64, positions of the flattened (B·L) whose next token is predicted.
        encoder_targets_N: int64, those next tokens.
        rows_K: int64, the row that each canvas belongs to; None when canvas k belongs to row k.
        starts: position of each canvas's first token, on the host.
        starts_K: int64, the same where the network is.
        canvas_ids_KC: int64, what the decoder sees.
        targets_KC: int64, what it should find.
        scored_KC: bool, positions whose prediction enters the loss.
        canvas_mask_KC: bool, positions that are there at all; None when all are.
        levels_K: float32, the noise level of each canvas, in (0, 1].
        conditioned_S: int64, canvases of the first pass, whose prediction the second one sees; None when no rank has
            any. A rank without one runs its first canvas and drops the result, so that all ranks do the same passes.
        conditioned_starts: where those begin, on the host.
        conditioned_weight_S: float32, 1 where the prediction is used, 0 where it is dropped.
        counts: as in `NoisyBatch`.
    """

    clean: Batch
    encoder_ids_BL: Tensor
    encoder_positions_N: Tensor
    encoder_targets_N: Tensor
    rows_K: Tensor | None
    starts: tuple[int, ...]
    starts_K: Tensor
    canvas_ids_KC: Tensor
    targets_KC: Tensor
    scored_KC: Tensor
    canvas_mask_KC: Tensor | None
    levels_K: Tensor
    conditioned_S: Tensor | None
    conditioned_starts: tuple[int, ...]
    conditioned_weight_S: Tensor | None
    counts: Mapping[str, float]

    def to(self, device: object) -> CanvasBatch:
        """Return the same batch with every tensor on `device`; the copies do not block."""
        return _moved(self, device)


class Corrupted(Protocol):
    """What the engine needs of a corrupted micro-batch of any kind."""

    @property
    def counts(self) -> Mapping[str, float]:
        """For each loss term, its local count."""
        ...

    def to(self, device: object) -> Any:
        """Return the same batch with every tensor on `device`."""
        ...


@dataclass(frozen=True)
class Pass:
    """One run of a network's blocks over a micro-batch, by its sizes.

    Attributes:
        queries: positions of each row that are computed, padding among them.
        before: for each row, the positions in front of those that they see too.
        gradient: whether a backward pass follows.
        outer: whether the matrices outside the blocks run as well, other than embedding and head.
    """

    queries: int
    before: tuple[int, ...]
    gradient: bool = True
    outer: bool = False


@dataclass(frozen=True)
class Work:
    """What an objective has a network compute for a micro-batch; `unmask.training.flops` counts its operations.

    Attributes:
        scored: positions that go through the head and back.
        mixed: positions whose prediction becomes a mix of embeddings, without a gradient through the prediction.
    """

    passes: tuple[Pass, ...]
    scored: int
    mixed: int = 0


@dataclass(frozen=True)
class LossTerm:
    """The value of one term, a sum over local positions; without gradient.

    Attributes:
        sum: scalar tensor, nats.
        count: local count; the same number as in `NoisyBatch.counts`.
        weight: factor of this term in the total loss.
    """

    sum: Tensor
    count: float
    weight: float = 1.0


@dataclass(frozen=True)
class TokenLosses:
    """One loss term position by position, without gradient: its sum is Σ weight · cross-entropy.

    Shape suffix: N positions, of which those of weight 0 are not scored.

    Attributes:
        cross_entropy_N: float32, nats.
        weights_N: float32, at least 0.
        levels_N: float32, the noise level at each position, in (0, 1]; None for a term without noise.
        count, weight: as in `LossTerm`.
    """

    cross_entropy_N: Tensor
    weights_N: Tensor
    levels_N: Tensor | None
    count: float
    weight: float = 1.0


@dataclass(frozen=True)
class LossTerms:
    """The loss of one objective on one micro-batch.

    Attributes:
        total: scalar tensor with gradient, Σ weight · sum / count, each count that of the global batch
            where it was given, else this micro-batch's own.
        terms: what it is made of, by name.
    """

    total: Tensor
    terms: Mapping[str, LossTerm]


def _moved(container: Any, device: object) -> Any:
    changes = {}
    for item in dataclasses.fields(container):
        value = getattr(container, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value.to(device, non_blocking=True)  # pyright: ignore[reportCallIssue, reportArgumentType]
        elif dataclasses.is_dataclass(value):
            changes[item.name] = _moved(value, device)
    return dataclasses.replace(container, **changes)
