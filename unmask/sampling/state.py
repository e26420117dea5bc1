"""What the denoising loop carries from one network call to the next. Tensors are on the CPU, never written in place.

Shapes: B rows, C answer positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class State:
    """The rows still being denoised; each step makes a new one.

    Attributes:
        rows: the requests' indices; the tensors' rows follow this order.
        answer_BC: int64, the answers so far. At open positions: the mask, or the current block's noisy tokens.
        open_BC: bool, positions that are not settled yet. Only this says so: a given token may be a mask.
        block_of_BC: int64, the block that each position belongs to.
        step_B: int64, calls made in the current block.
        nfe_B: int64, calls made for the row.
        key_B: int64, where each row's random numbers come from.
        likely_BC: int64, the most likely tokens of the call before; -1 where the current block has had none.
        stable_B: int64, for how many calls on end the current block's most likely tokens have not changed.
    """

    rows: tuple[int, ...]
    answer_BC: Tensor
    open_BC: Tensor
    block_of_BC: Tensor
    step_B: Tensor
    nfe_B: Tensor
    key_B: Tensor
    likely_BC: Tensor
    stable_B: Tensor

    @property
    def block_B(self) -> Tensor:
        """The current block of each row: the first with an open position."""
        return self.block_of_BC.masked_fill(~self.open_BC, self.block_of_BC.shape[1]).amin(dim=1)

    @property
    def active_BC(self) -> Tensor:
        """The open positions of each row's current block, bool."""
        return self.open_BC & (self.block_of_BC == self.block_B[:, None])

    def take(self, keep_B: Tensor) -> State:
        """Return the rows where `keep_B` is True."""
        rows = tuple(row for row, keep in zip(self.rows, keep_B.tolist(), strict=True) if keep)
        tensors = (self.answer_BC, self.open_BC, self.block_of_BC, self.step_B, self.nfe_B, self.key_B)
        return State(rows, *(tensor[keep_B] for tensor in (*tensors, self.likely_BC, self.stable_B)))


@dataclass(frozen=True)
class Tokens:
    """Tokens with a meaning to the loop.

    Attributes:
        stop: an answer ends before the first of these.
        banned: never written.
        deferred: written only when a block has nothing else to settle.
    """

    stop: tuple[int, ...]
    banned: tuple[int, ...]
    deferred: tuple[int, ...]
