"""What a call does beside accepting candidates: which tokens are settled for good, taken back or written over.

A way to revise is one function and one line in `REVISERS`.

Every way ends. In each call of a block at least one position more is settled than is taken back, so a block of n open
positions takes at most n calls; a canvas takes at most `steps`.

Shapes: B rows, C answer columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.sampling.engine.rules import ranks
from unmask.sampling.engine.state import State
from unmask.sampling.settings import CanvasSettings, MaskSettings, Settings

# (state, where_BC) → int64 (B, C), what stands at open positions before the next call: masks, or random tokens.
Noise = Callable[[State, Tensor], Tensor]


@dataclass(frozen=True)
class Proposal:
    """What a call says of the positions that it weighed, in their places; tensors (B, C) on the CPU.

    Attributes:
        candidate_BC: int64, the token that each would take; elsewhere what stands there.
        likely_BC: int64, the most likely token; elsewhere what stands there.
        score_BC: float32, the score of each open position that was weighed, larger first; -inf elsewhere.
        confidence_BC: float32, probability of the candidate (of a canvas: of the most likely token, at its
            temperature); 0 elsewhere.
        standing_BC: float32, probability of the token that stands at a weighed position; 0 elsewhere, and everywhere
            where the way to revise does not ask for it.
        highest_BC: float32, probability of the most likely token, likewise.
    """

    candidate_BC: Tensor
    likely_BC: Tensor
    score_BC: Tensor
    confidence_BC: Tensor
    standing_BC: Tensor
    highest_BC: Tensor


@dataclass(frozen=True)
class Revision:
    """The outcome of a call.

    Attributes:
        state: with the next answer; which positions are open is still as before.
        settled_BC: bool, open positions that are settled now.
        remasked_BC: bool, settled positions that are open again.
        revised_BC: bool, positions that a call before had given a token which is now taken back or replaced.
    """

    state: State
    settled_BC: Tensor
    remasked_BC: Tensor
    revised_BC: Tensor


def settle(state: State, accept_BC: Tensor, proposal: Proposal, settings: Settings, noise: Noise) -> Revision:
    """Settle what is accepted; settled tokens never change."""
    answer_BC = torch.where(accept_BC, proposal.candidate_BC, state.answer_BC)
    nothing_BC = torch.zeros_like(accept_BC)
    return Revision(replace(state, answer_BC=answer_BC), accept_BC, nothing_BC, nothing_BC)


def remask(state: State, accept_BC: Tensor, proposal: Proposal, settings: Settings, noise: Noise) -> Revision:
    """Settle what is accepted, and mask tokens of the current block again that have become improbable.

    Improbable: p(token | this call) < `revise_threshold`, the least probable first. A row takes back fewer than it
    settles in the same call, so it never needs more calls than one token a call would. A settled token is judged with
    itself in sight, where WINO (arXiv 2507.18578) judges it from a masked copy of the block beside it.
    """
    assert isinstance(settings, MaskSettings)
    doubtful_BC = state.revisable_BC & (proposal.standing_BC < settings.revise_threshold)
    most_B = accept_BC.sum(dim=1) - 1
    taken_BC = doubtful_BC & (ranks(-proposal.standing_BC, doubtful_BC) < most_B[:, None])
    answer_BC = torch.where(accept_BC, proposal.candidate_BC, state.answer_BC)
    answer_BC = torch.where(taken_BC, noise(state, taken_BC), answer_BC)
    return Revision(replace(state, answer_BC=answer_BC), accept_BC, taken_BC, taken_BC)


def edit(state: State, accept_BC: Tensor, proposal: Proposal, settings: Settings, noise: Noise) -> Revision:
    """Settle what is accepted, and replace tokens of the current block by others that have become probable.

    Probable: the most likely token differs and has at least `revise_threshold`. Edits go along with calls that settle
    something, so they cost no calls (LLaDA2.1's token-to-token edits go on after a block is full).
    """
    assert isinstance(settings, MaskSettings)
    other_BC = (proposal.likely_BC != state.answer_BC) & (proposal.highest_BC >= settings.revise_threshold)
    edited_BC = state.revisable_BC & other_BC
    answer_BC = torch.where(accept_BC, proposal.candidate_BC, state.answer_BC)
    answer_BC = torch.where(edited_BC, proposal.likely_BC, answer_BC)
    return Revision(replace(state, answer_BC=answer_BC), accept_BC, torch.zeros_like(edited_BC), edited_BC)


def redraw(state: State, accept_BC: Tensor, proposal: Proposal, settings: Settings, noise: Noise) -> Revision:
    """Keep what is accepted and draw the rest anew, or settle the most likely tokens where a canvas stops.

    It stops when it is stable and certain, or after its last call. Source: transformers,
    generation_diffusion_gemma.py.
    """
    assert isinstance(settings, CanvasSettings)
    active_BC = state.active_BC
    same_B = ((proposal.likely_BC == state.likely_BC) | ~active_BC).all(dim=1)
    stable_B = torch.where(same_B, state.stable_B + 1, 0)
    entropy_B = -proposal.score_BC.masked_fill(~active_BC, 0).sum(dim=1) / active_BC.sum(dim=1)
    sure_B = (stable_B >= settings.stability_threshold) & (entropy_B < settings.confidence_threshold)
    settled_BC = active_BC & (sure_B | (state.step_B + 1 >= settings.steps))[:, None]
    # The numbers are those of the next call, which sees them; a block's first were those of the first.
    drawn_BC = noise(replace(state, nfe_B=state.nfe_B + 1), active_BC)
    answer_BC = torch.where(active_BC & ~accept_BC, drawn_BC, state.answer_BC)
    answer_BC = torch.where(accept_BC, proposal.candidate_BC, answer_BC)
    answer_BC = torch.where(settled_BC, proposal.likely_BC, answer_BC)
    likely_BC = torch.where(active_BC, proposal.likely_BC, state.likely_BC)
    after = replace(state, answer_BC=answer_BC, likely_BC=likely_BC, stable_B=stable_B)
    revised_BC = active_BC & ~accept_BC & ~settled_BC
    return Revision(after, settled_BC, torch.zeros_like(settled_BC), revised_BC)


@dataclass(frozen=True)
class Reviser:
    """A way to revise.

    Attributes:
        apply: (state, accepted, proposal, settings, noise) → the outcome of a call.
        rereads: whether it asks what the network says of the current block's settled tokens; they then go through the
            head as well.
    """

    apply: Callable[[State, Tensor, Proposal, Settings, Noise], Revision]
    rereads: bool = False


REVISERS: dict[str, Reviser] = {
    "none": Reviser(settle),
    "remask": Reviser(remask, rereads=True),
    "edit": Reviser(edit, rereads=True),
    "redraw": Reviser(redraw),
}
