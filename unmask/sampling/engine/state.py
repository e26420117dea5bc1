"""What the denoising loop is asked for, and what it carries from one network call to the next.

Tensors are on the CPU and never written in place: they are a few numbers a row, and bookkeeping there leaves two waits
for the device a call, as what the network reads goes up and as what it predicts comes back.

Shapes: B rows, C answer columns (the longest row's; shorter ones are padded on the right), M positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import SamplingError
from unmask.ops.padding import concat_padded
from unmask.sampling.settings import SamplerSettings

# Bytes. In `send` each tensor starts at a multiple of them, as the widest dtype must.
_ALIGNMENT = 8
# What a padding column holds of each field: a token 0 that is given, in no block.
_PADDING = {
    "answer_BC": 0, "target_BC": -1, "masked_BC": False, "given_BC": True, "block_of_BC": -1, "calls_BC": 0,
    "argmax_BC": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """An answer of which parts are given. A mask among the given tokens is text: only `masked` says what is not.

    Where the model fixes the size of a block (DiffusionGemma's canvas), blocks must be whole.
    """

    answer_ids: Sequence[int]  # at masked positions any
    masked: Sequence[bool]  # for each position, whether it is to be filled; at least one
    block_of: Sequence[int]  # for each, the block that it is denoised in; rising, in steps of one

    def __post_init__(self) -> None:
        if not len(self.answer_ids) == len(self.masked) == len(self.block_of):
            raise SamplingError("template: answer_ids, masked and block_of must have one entry a position each")
        if not any(self.masked):
            raise SamplingError("template: no position is masked; there is nothing to fill")
        if self.block_of[0] != 0 or any(after - before not in (0, 1) for before, after in pairwise(self.block_of)):
            raise SamplingError("template: block_of must start at 0 and rise in steps of one")


@dataclass(frozen=True)
class Request:
    """One answer to sample.

    With `target_ids`, the expected token of each template position, the row ends as soon as a committed token differs,
    and no stop token ends it.
    """

    index: int  # the caller's number for it, found again in the events
    prompt_ids: Sequence[int]
    key: int  # int64 that all its random numbers derive from (`draws.row_keys`)
    template: Template | None = None  # where parts are given; None = `max_new_tokens` masked positions
    target_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens with a meaning to the loop."""

    stop: tuple[int, ...]  # an answer ends before the first one that the sampler committed
    banned: tuple[int, ...]  # never written
    deferred: tuple[int, ...]  # written only when a block has nothing else to commit
    mask: int | None  # held by masked positions; None for uniform noise
    vocab_size: int  # ids from here on are padding of the vocabulary, and never written


@dataclass(frozen=True)
class Positions:
    """Some positions of a batch's answers, int64 (M,) each. The first three are the keys of their random numbers."""

    key_M: Tensor  # of the row that each stands in
    call_M: Tensor  # number of the row's network call
    column_M: Tensor  # in the answer
    step_M: Tensor  # number of the call within its block
    current_M: Tensor  # the token that stands there

    def __getitem__(self, part: slice) -> Positions:
        """Return some of the positions."""
        return Positions(*(getattr(self, field.name)[part] for field in fields(self)))

    @property
    def tensor_5M(self) -> Tensor:
        """All fields as one tensor; `Positions(*tensor_5M)` is the way back."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])


@dataclass(frozen=True)
class State:
    """The rows still being denoised; each call makes a new one. What is not described here is as in `StepEvent`."""

    rows: tuple[int, ...]
    answer_BC: Tensor
    target_BC: Tensor  # int64, the tokens that a row must commit to go on; -1 = any
    masked_BC: Tensor
    given_BC: Tensor  # bool, positions that were never masked, and padding
    block_of_BC: Tensor  # int64, the block that each position belongs to, rising from left to right; -1 at padding
    calls_BC: Tensor  # int64, calls that the schedule plans for that block; 0 where nothing was masked
    length_B: Tensor  # int64, columns of each row that are in use
    shown_B: Tensor  # int64, columns of each row that the caller asked for; a last canvas may have more
    step_B: Tensor  # int64, calls made in the current block
    nfe_B: Tensor  # int64, calls made for the row
    key_B: Tensor  # int64, where each row's random numbers come from
    argmax_BC: Tensor  # int64, the most likely tokens of the call before; -1 where the current block has had none
    stable_B: Tensor  # int64, calls on end in which the current block's most likely tokens have not changed

    @cached_property
    def block_B(self) -> Tensor:
        """The current block of each row: the first with a masked position."""
        return self.block_of_BC.masked_fill(~self.masked_BC, torch.iinfo(torch.int64).max).amin(dim=1)

    @cached_property
    def within_BC(self) -> Tensor:
        """All positions of each row's current block, bool."""
        return self.block_of_BC == self.block_B[:, None]

    @cached_property
    def first_B(self) -> Tensor:
        """The first column of each row's current block."""
        return self.within_BC.long().argmax(dim=1)

    @cached_property
    def end_B(self) -> Tensor:
        """The column behind each row's current block."""
        return self.first_B + self.within_BC.sum(dim=1)

    @cached_property
    def active_BC(self) -> Tensor:
        """The masked positions of each row's current block, bool."""
        return self.masked_BC & self.within_BC

    @cached_property
    def revisable_BC(self) -> Tensor:
        """The positions of each row's current block that this sampler has committed, bool."""
        return self.within_BC & ~self.masked_BC & ~self.given_BC

    def positions(self, where_BC: Tensor) -> Positions:
        """Return the positions where `where_BC` is True, row by row."""
        rows_M, column_M = where_BC.nonzero(as_tuple=True)
        current_M = self.answer_BC[rows_M, column_M]
        return Positions(self.key_B[rows_M], self.nfe_B[rows_M], column_M, self.step_B[rows_M], current_M)

    def select(self, keep_B: Tensor) -> State:
        """Return the rows where `keep_B` is True, without columns that are then padding in all."""
        rows = tuple(row for row, keep in zip(self.rows, keep_B.tolist(), strict=True) if keep)
        width = int((self.block_of_BC[keep_B] >= 0).sum(dim=1).max()) if rows else 0
        selected = {name: value[keep_B] for name, value in self._tensors()}
        return State(
            rows, **{name: value[:, :width] if name in _PADDING else value for name, value in selected.items()}
        )

    def concat(self, *more: State) -> State:
        """Return these rows and those of `more` behind them."""
        states = (self, *more)
        tensors = {
            name: concat_padded([getattr(state, name) for state in states], _PADDING[name])
            if name in _PADDING
            else torch.cat([getattr(state, name) for state in states])
            for name, _ in self._tensors()
        }
        return State(tuple(row for state in states for row in state.rows), **tensors)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "rows"]


def starting_state(requests: Sequence[Request], settings: SamplerSettings, mask_id: int | None) -> State:
    """Return the state before the first call: the mask (or, until its block begins, token 0) at masked positions."""
    first, *others = (_row(request, settings, mask_id) for request in requests)
    return first.concat(*others)


def _row(request: Request, settings: SamplerSettings, mask_id: int | None) -> State:
    template, shown = request.template, settings.max_new_tokens
    if template is None:
        columns = range(settings.length)
        template = Template([0] * len(columns), [True] * len(columns), [at // settings.block_size for at in columns])
    else:
        shown = len(template.answer_ids)
    length = len(template.answer_ids)
    targets = [-1] * length if request.target_ids is None else request.target_ids
    if len(targets) != length:
        raise SamplingError("request: target_ids must have one token a position of the answer")
    masked_1C, block_of_1C = torch.tensor([template.masked]), torch.tensor([template.block_of])
    sizes = torch.bincount(block_of_1C[masked_1C], minlength=int(block_of_1C.max()) + 1).tolist()
    zero_1 = torch.zeros(1, dtype=torch.long)
    return State(
        rows=(request.index,),
        answer_BC=torch.tensor([template.answer_ids]).masked_fill(masked_1C, 0 if mask_id is None else mask_id),
        target_BC=torch.tensor([targets]),
        masked_BC=masked_1C,
        given_BC=~masked_1C,
        block_of_BC=block_of_1C,
        calls_BC=torch.tensor(settings.calls(sizes))[block_of_1C],
        length_B=zero_1 + length,
        shown_B=zero_1 + shown,
        step_B=zero_1,
        nfe_B=zero_1,
        key_B=torch.tensor([request.key]),
        argmax_BC=torch.full((1, length), -1),
        stable_B=zero_1,
    )


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of one device on another: their bytes travel as one tensor, of which the results are views.

    Each copy waits until the device is done. Tensors that are there already are returned as they are.
    """
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    padded = [F.pad(part, (0, -len(part) % _ALIGNMENT)) if len(part) % _ALIGNMENT else part for part in parts]
    pieces = torch.cat(padded).to(device).split([len(part) for part in padded])
    return [
        piece[: len(part)].view(tensor.dtype).view(tensor.shape)
        for piece, part, tensor in zip(pieces, parts, tensors, strict=True)
    ]
