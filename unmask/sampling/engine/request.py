"""What the denoising loop is asked for: an answer to a prompt, free or with parts of it given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from unmask.errors import SamplingError
from unmask.sampling.engine.schedule import planned_calls
from unmask.sampling.engine.state import State
from unmask.sampling.settings import MaskSettings, Settings


@dataclass(frozen=True)
class Template:
    """An answer of which parts are given. A literal mask among the given tokens is text: only `open` says what is not.

    Attributes:
        answer_ids: its tokens; at open positions any.
        open: for each, whether it is to be filled; at least one.
        block_of: for each, the block that it is denoised in; rising, in steps of one. A family with blocks of a fixed
            size (DiffusionGemma's canvas) needs whole ones.
    """

    answer_ids: Sequence[int]
    open: Sequence[bool]
    block_of: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.answer_ids) == len(self.open) == len(self.block_of):
            raise SamplingError("template: answer_ids, open and block_of must have one entry a position each")
        if not any(self.open):
            raise SamplingError("template: no position is open; there is nothing to fill")
        if self.block_of[0] != 0 or any(after - before not in (0, 1) for before, after in pairwise(self.block_of)):
            raise SamplingError("template: block_of must start at 0 and rise in steps of one")


@dataclass(frozen=True)
class Request:
    """One answer to sample.

    Attributes:
        index: the caller's number for it, found again in the events.
        prompt_ids: given tokens before the answer.
        key: int64 that all its random numbers derive from (`draws.row_keys`).
        template: the answer where parts of it are given; None = `max_new_tokens` open positions.
    """

    index: int
    prompt_ids: Sequence[int]
    key: int
    template: Template | None = None


def open_answer(settings: Settings) -> Template:
    """Return an answer of which nothing is given."""
    length = settings.length
    return Template([0] * length, [True] * length, [place // settings.block_size for place in range(length)])


def starting_state(requests: Sequence[Request], settings: Settings, mask_id: int | None) -> State:
    """Return the state before the first call: the mask (or, until its block begins, token 0) at open positions."""
    first, *others = (_row(request, settings, mask_id) for request in requests)
    return first.join(*others)


def _row(request: Request, settings: Settings, mask_id: int | None) -> State:
    template = open_answer(settings) if request.template is None else request.template
    length = len(template.answer_ids)
    masked_1C = torch.tensor([template.open], dtype=torch.bool)
    block_of_1C = torch.tensor([template.block_of], dtype=torch.long)
    sizes = torch.bincount(block_of_1C[masked_1C], minlength=int(block_of_1C.max()) + 1).tolist()
    # A canvas has its own number of calls at the most, whatever is open in it; it stops by itself.
    calls = (
        planned_calls(sizes, settings.steps) if isinstance(settings, MaskSettings) else [settings.steps] * len(sizes)
    )
    zero_1 = torch.zeros(1, dtype=torch.long)
    return State(
        rows=(request.index,),
        answer_BC=torch.tensor([template.answer_ids]).masked_fill(masked_1C, 0 if mask_id is None else mask_id),
        masked_BC=masked_1C,
        given_BC=~masked_1C,
        block_of_BC=block_of_1C,
        calls_BC=torch.tensor(calls)[block_of_1C],
        length_B=zero_1 + length,
        shown_B=zero_1 + (length if request.template is not None else settings.max_new_tokens),
        step_B=zero_1,
        nfe_B=zero_1,
        key_B=torch.tensor([request.key]),
        likely_BC=torch.full((1, length), -1),
        stable_B=zero_1,
    )
