"""What the denoising loop carries from one network call to the next. Tensors are on the CPU, never written in place.

Shapes: B rows, C answer columns: the longest row's; shorter ones are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# What a padding column holds of each field; a token 0 that is given, in no block.
_PADDING = {"answer_BC": 0, "masked_BC": False, "given_BC": True, "block_of_BC": -1, "calls_BC": 0, "likely_BC": -1}


@dataclass(frozen=True)
class State:
    """The rows still being denoised; each step makes a new one.

    Attributes:
        rows: the requests' indices; the tensors' rows follow this order.
        answer_BC: int64, the answers so far. At open positions: the mask, or the current block's noisy tokens.
        masked_BC: bool, positions that are not settled yet. Only this says so: a given token may be a mask.
        given_BC: bool, positions that were never open, and padding.
        block_of_BC: int64, the block that each position belongs to, rising from left to right; -1 at padding.
        calls_BC: int64, calls that the schedule plans for that block; 0 where nothing was open.
        length_B: int64, columns of each row that are in use.
        shown_B: int64, columns of each row that the caller asked for; a last canvas may have more.
        step_B: int64, calls made in the current block.
        nfe_B: int64, calls made for the row.
        key_B: int64, where each row's random numbers come from.
        likely_BC: int64, the most likely tokens of the call before; -1 where the current block has had none.
        stable_B: int64, for how many calls on end the current block's most likely tokens have not changed.
    """

    rows: tuple[int, ...]
    answer_BC: Tensor
    masked_BC: Tensor
    given_BC: Tensor
    block_of_BC: Tensor
    calls_BC: Tensor
    length_B: Tensor
    shown_B: Tensor
    step_B: Tensor
    nfe_B: Tensor
    key_B: Tensor
    likely_BC: Tensor
    stable_B: Tensor

    @cached_property
    def block_B(self) -> Tensor:
        """The current block of each row: the first with an open position."""
        return self.block_of_BC.masked_fill(~self.masked_BC, torch.iinfo(torch.int64).max).amin(dim=1)

    @cached_property
    def within_BC(self) -> Tensor:
        """All positions of each row's current block, bool."""
        return self.block_of_BC == self.block_B[:, None]

    @cached_property
    def active_BC(self) -> Tensor:
        """The open positions of each row's current block, bool."""
        return self.masked_BC & self.within_BC

    @cached_property
    def revisable_BC(self) -> Tensor:
        """The positions of each row's current block that this sampler has settled, bool."""
        return self.within_BC & ~self.masked_BC & ~self.given_BC

    def take(self, keep_B: Tensor) -> State:
        """Return the rows where `keep_B` is True, without columns that are then padding in all."""
        rows = tuple(row for row, keep in zip(self.rows, keep_B.tolist(), strict=True) if keep)
        width = int((self.block_of_BC[keep_B] >= 0).sum(dim=1).max()) if rows else 0
        kept = {name: value[keep_B] for name, value in self._tensors()}
        return State(rows, **{name: value[:, :width] if name in _PADDING else value for name, value in kept.items()})

    def join(self, *more: State) -> State:
        """Return these rows and those of `more` behind them."""
        states = (self, *more)
        width = max(state.answer_BC.shape[1] for state in states)
        joined = {
            name: torch.cat([_widen(name, getattr(state, name), width) for state in states])
            for name, _ in self._tensors()
        }
        return State(tuple(row for state in states for row in state.rows), **joined)

    def opened(self, settled_BC: Tensor, remasked_BC: Tensor) -> State:
        """Return the state with some positions settled and others open again."""
        return replace(self, masked_BC=(self.masked_BC & ~settled_BC) | remasked_BC)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "rows"]


def _widen(name: str, value: Tensor, width: int) -> Tensor:
    return F.pad(value, (0, width - value.shape[1]), value=_PADDING[name]) if name in _PADDING else value


@dataclass(frozen=True)
class Tokens:
    """Tokens with a meaning to the loop.

    Attributes:
        stop: an answer ends before the first of these that the sampler wrote.
        banned: never written.
        deferred: written only when a block has nothing else to settle.
        mask: what stands at open positions; None where that is noise.
    """

    stop: tuple[int, ...]
    banned: tuple[int, ...]
    deferred: tuple[int, ...]
    mask: int | None
