"""What the denoising loop asks of a network: `prefill` prompts, `denoise` answers, `commit` finished blocks.

Rows stand on the left, each in its own columns: prompt at 0..P_b, answer at P_b..P_b + C_b, padding behind. So a row's
positions are those that it has alone, and rows may join a batch and leave it at any time.

Shapes: B rows, C answer columns, M scored positions, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.errors import SamplingError
from unmask.models.family import Attention
from unmask.models.registry import resolve
from unmask.sampling.engine.state import Positions
from unmask.sampling.settings import SamplerSettings, settings_for


@dataclass(frozen=True)
class ModelSpec:
    """What the loop must know about a model."""

    mask_id: int | None
    banned_ids: tuple[int, ...]  # tokens that never belong in an answer, the mask among them
    eos_ids: tuple[int, ...]  # the model's own end-of-text tokens
    vocab_size: int  # logits of rows from here on are padding
    rows: int  # of the head, and of the embedding
    max_length: int


@dataclass(frozen=True)
class Call:
    """What one network call is about. All tensors are int64, on the CPU."""

    answer_BC: Tensor  # the answers so far, right-padded; at masked positions the noise that the network is shown
    lengths: tuple[int, ...]  # answer columns in use, the rest is never seen; from call to call a row's never grows
    first_B: Tensor  # the current block's columns in the answer are [first, end)
    end_B: Tensor
    step_B: Tensor  # calls made in this block so far; 0 is its first call
    rows_M: Tensor  # the rows of the scored positions, rising
    positions: Positions  # the scored positions, row by row, all in the current block


class Backend(Protocol):
    """One way of attending, made as `Class(model, settings)`.

    What it knows of a batch's rows from the calls before is a context of its own, of which the loop asks
    `select(keep_B)` for the rows where a bool on the CPU is True, and `concat(more)` to put another's behind them.
    """

    spec: ModelSpec
    device: torch.device

    @property
    def self_conditioning(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """None, or what the network is shown of a prediction in the block's next call, (M, D).

        It is made of (weights_MV, total_M), where p = weights / total, and given to the context's `conditioned`.
        """
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Take in the prompts; return the context that later calls need."""
        ...

    def denoise(self, context: Any, call: Call) -> tuple[Tensor, Positions, Any]:
        """Run the network once; return hidden states (M, …) of the call's positions, these, and the context afterwards.

        The hidden states are valid until the next call. The positions are on the device: they go there in one copy with
        all that the network reads (`state.send`), since each copy waits.
        """
        ...

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return logits (M, V) of some of the hidden states that `denoise` gave; they may be overwritten."""
        ...

    def commit(self, context: Any, answer_BC: Tensor, first_B: Tensor, end_B: Tensor, completed_B: Tensor) -> Any:
        """Return the context after rows with `completed_B` True have committed their columns [first, end).

        That is their current block and whatever is given between it and the next block with a masked position.
        """
        ...


# How a network attends → its backend, "module:Class".
BACKENDS: dict[Attention, str] = {
    "bidirectional": "unmask.sampling.backends.bidirectional:BidirectionalBackend",
    "canvas": "unmask.sampling.backends.canvas:CanvasBackend",
}


def backend_for(model: nn.Module, settings: SamplerSettings | None = None) -> Backend:
    """Return the backend of a network; settings None = what it is sampled with by itself.

    Raises:
        SamplingError: a model of no known family, or with attention that no backend computes.
    """
    settings = settings_for(model) if settings is None else settings
    if settings.attention not in BACKENDS:
        raise SamplingError(f"{settings.family}: {settings.attention} attention has no backend to sample with")
    return resolve(BACKENDS[settings.attention])(model, settings)
