"""What the denoising loop asks of a model family: `prefill` prompts, `denoise` answers, `commit` finished blocks.

Rows stand on the left, each in its own columns: prompt at 0..P_b, answer at P_b..P_b + C_b, padding behind. So a row's
positions are those that it has alone, and rows may join a batch and leave it at any time.

Shapes: B rows, C answer positions, M scored positions, D width, V vocabulary rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from unmask.config.sampler import SamplerConfig
from unmask.sampling.family_settings import Attention
from unmask.sampling.settings import Settings, default_settings, family_sampler, resolve


@dataclass(frozen=True)
class FamilySpec:
    """What the loop must know about a model.

    Attributes:
        noise: what stands at open positions: `mask`, or `uniform` random tokens; a key of `process.PROCESSES`.
        mask_id: the mask; None where there is none.
        banned_ids: tokens that never belong in an answer, the mask among them.
        eos_ids: the model's own end-of-text tokens.
        vocab_size: logits of rows from here on are padding.
        rows: ids that the model accepts are below this, and the head has as many.
        max_length: longest prompt and answer together, in tokens.
        attention: the family's, a key of `family_settings.CACHES`.
        block_size: tokens of a block where the model fixes them (DiffusionGemma's canvas); None = any.
        logit_shift: the hidden state at position p − shift predicts the token at p.
    """

    noise: Literal["mask", "uniform"]
    mask_id: int | None
    banned_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    vocab_size: int
    rows: int
    max_length: int
    attention: Attention = "bidirectional"
    block_size: int | None = None
    logit_shift: int = 0


@dataclass(frozen=True)
class Call:
    """What one network call is about. All tensors are on the CPU.

    Attributes:
        answer_BC: int64, the answers so far, right-padded; at open positions the noise that the network is shown.
        lengths: answer columns in use, a row. Columns from there on are padding and never seen; a row's length may
            shrink from one call to the next, and never grows.
        block_B: int64, number of the current block.
        first_B, end_B: int64, the current block's columns in the answer, [first, end).
        step_B: int64, calls made in this block so far; 0 is its first call.
        rows_M, positions_M: int64, whose hidden states are wanted: rows, and answer columns, row-major and ascending.
            They are the scored positions less the model's `logit_shift`, so -1 is the prompt's last token.
    """

    answer_BC: Tensor
    lengths: tuple[int, ...]
    block_B: Tensor
    first_B: Tensor
    end_B: Tensor
    step_B: Tensor
    rows_M: Tensor
    positions_M: Tensor


class Backend(Protocol):
    """One family's way to compute logits, made as `Class(model, settings)`.

    The context is whatever `prefill` returns; the loop calls its `take(keep_B)`, and where the network conditions on
    its own predictions its `told(signal_MD)`.

    Attributes:
        spec: what the loop must know.
        device: where the network is.
    """

    spec: FamilySpec
    device: torch.device

    @property
    def signal(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """None, or what the network is told of a prediction in the next call of the block, (M, D).

        Arguments: (weights_MV, total_M); the probabilities are weights / total.
        """
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Take in the prompts and return the context that later calls need."""
        ...

    def join(self, context: Any, more: Any) -> Any:
        """Return a context with the rows of `more` behind those of `context`; both come from `prefill` or later."""
        ...

    def denoise(self, context: Any, call: Call) -> tuple[Tensor, Any]:
        """Run the network once; return hidden states (M, …) at the call's positions, and the context afterwards.

        The hidden states are valid until the next call.
        """
        ...

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return logits (M, V) of some of the hidden states that `denoise` gave.

        They may be overwritten, and are valid until the next call.
        """
        ...

    def commit(self, context: Any, answer_BC: Tensor, first_B: Tensor, end_B: Tensor, completed_B: Tensor) -> Any:
        """Return the context after rows with `completed_B` True have settled their columns [first, end).

        That is their current block and whatever is given between it and the next block with an open position.
        """
        ...


def settings_for(model: nn.Module, sampler: SamplerConfig | None = None) -> Settings:
    """Return what a model is sampled with: its family's defaults, its checkpoint's, and then the caller's settings.

    Raises:
        SamplingError: a model of no family that can be sampled from, or a setting that its family does not have.
        ModelError: a bad value in the checkpoint's generation_config.json.
    """
    family_sampler(getattr(model, "config", None), model)
    return resolve(sampler, default_settings(model.config, getattr(model, "generation", {})))


def backend_for(model: nn.Module, settings: Settings | None = None) -> Backend:
    """Return the backend for a model, found by the name of its configuration's class (`settings.SAMPLERS`).

    Args:
        model: the network.
        settings: of the model's family; None = its defaults.

    Raises:
        SamplingError: a model of no family that can be sampled from.
    """
    entry = family_sampler(getattr(model, "config", None), model)
    factory = getattr(importlib.import_module(entry.module), entry.adapter)
    return factory(model, settings if settings is not None else settings_for(model))
