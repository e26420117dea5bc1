"""What a call does beside accepting samples: which tokens are committed, masked again or written over.

A way to revise is one function and one line in `REVISERS`.

Every way ends. In each call of a block at least one position more is committed than is masked again, so a block of n
masked positions takes at most n calls; a canvas takes at most `steps`.

Shapes: B rows, C answer columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.sampling.engine.rules import ranks
from unmask.sampling.engine.state import State
from unmask.sampling.settings import SamplerSettings

# (state, where_BC) → int64 (B, C), what stands at masked positions before the next call: masks, or random tokens.
Noise = Callable[[State, Tensor], Tensor]


@dataclass(frozen=True)
class Proposal:
    """What a call says of the positions that it scored, in their places; tensors (B, C) on the CPU.

    Attributes:
        sample_BC, argmax_BC: as in `noise.Predictions`; elsewhere what stands there.
        score_BC: the same of masked positions; -inf elsewhere.
        confidence_BC: the same of masked positions; 0 elsewhere.
        current_BC, highest_BC: the same; 0 elsewhere.
    """

    sample_BC: Tensor
    argmax_BC: Tensor
    score_BC: Tensor
    confidence_BC: Tensor
    current_BC: Tensor
    highest_BC: Tensor


@dataclass(frozen=True)
class Revision:
    """The outcome of a call.

    Attributes:
        state: the next answer, and what of it is masked.
        committed_BC: bool, masked positions that are committed now.
        revised_BC: bool, positions that a call before had given a token which is now taken back or replaced.
    """

    state: State
    committed_BC: Tensor
    revised_BC: Tensor


def commit(state: State, accept_BC: Tensor, proposal: Proposal, settings: SamplerSettings, noise: Noise) -> Revision:
    """Commit what is accepted; committed tokens never change."""
    answer_BC = torch.where(accept_BC, proposal.sample_BC, state.answer_BC)
    after = replace(state, answer_BC=answer_BC, masked_BC=state.masked_BC & ~accept_BC)
    return Revision(after, accept_BC, torch.zeros_like(accept_BC))


def remask(state: State, accept_BC: Tensor, proposal: Proposal, settings: SamplerSettings, noise: Noise) -> Revision:
    """Commit what is accepted, and mask tokens of the current block again that have become improbable.

    Improbable: p(token | this call) < `revise_threshold`, the least probable first. A row takes back fewer than it
    commits in the same call, so it never needs more calls than one token a call would. A committed token is judged with
    itself in sight, where WINO (arXiv 2507.18578) judges it from a masked copy of the block beside it.
    """
    doubtful_BC = state.revisable_BC & (proposal.current_BC < _threshold(settings))
    most_B = accept_BC.sum(dim=1) - 1
    remasked_BC = doubtful_BC & (ranks(-proposal.current_BC, doubtful_BC) < most_B[:, None])
    answer_BC = torch.where(accept_BC, proposal.sample_BC, state.answer_BC)
    answer_BC = torch.where(remasked_BC, noise(state, remasked_BC), answer_BC)
    after = replace(state, answer_BC=answer_BC, masked_BC=(state.masked_BC & ~accept_BC) | remasked_BC)
    return Revision(after, accept_BC, remasked_BC)


def edit(state: State, accept_BC: Tensor, proposal: Proposal, settings: SamplerSettings, noise: Noise) -> Revision:
    """Commit what is accepted, and replace tokens of the current block by others that have become probable.

    Probable: the most likely token differs and has at least `revise_threshold`. Edits go along with calls that commit
    something, so they cost no calls (LLaDA2.1's token-to-token edits go on after a block is full).
    """
    differs_BC = proposal.argmax_BC != state.answer_BC
    edited_BC = state.revisable_BC & differs_BC & (proposal.highest_BC >= _threshold(settings))
    committed = commit(state, accept_BC, proposal, settings, noise)
    answer_BC = torch.where(edited_BC, proposal.argmax_BC, committed.state.answer_BC)
    return Revision(replace(committed.state, answer_BC=answer_BC), accept_BC, edited_BC)


def _threshold(settings: SamplerSettings) -> float:
    assert settings.revise_threshold is not None
    return settings.revise_threshold


def redraw(state: State, accept_BC: Tensor, proposal: Proposal, settings: SamplerSettings, noise: Noise) -> Revision:
    """Keep what is accepted and draw the rest anew, or commit the most likely tokens where a canvas stops.

    It stops when it is stable and certain, or after its last call. Source: transformers,
    generation_diffusion_gemma.py.
    """
    assert settings.stability_threshold is not None and settings.confidence_threshold is not None
    active_BC = state.active_BC
    same_B = ((proposal.argmax_BC == state.argmax_BC) | ~active_BC).all(dim=1)
    stable_B = torch.where(same_B, state.stable_B + 1, 0)
    entropy_B = -proposal.score_BC.masked_fill(~active_BC, 0).sum(dim=1) / active_BC.sum(dim=1)
    sure_B = (stable_B >= settings.stability_threshold) & (entropy_B < settings.confidence_threshold)
    committed_BC = active_BC & (sure_B | (state.step_B + 1 >= settings.steps))[:, None]
    # The numbers are those of the next call, which sees them; a block's first were those of the first.
    drawn_BC = noise(replace(state, nfe_B=state.nfe_B + 1), active_BC)
    answer_BC = torch.where(active_BC & ~accept_BC, drawn_BC, state.answer_BC)
    answer_BC = torch.where(accept_BC, proposal.sample_BC, answer_BC)
    answer_BC = torch.where(committed_BC, proposal.argmax_BC, answer_BC)
    after = replace(
        state,
        answer_BC=answer_BC,
        masked_BC=state.masked_BC & ~committed_BC,
        argmax_BC=torch.where(active_BC, proposal.argmax_BC, state.argmax_BC),
        stable_B=stable_B,
    )
    return Revision(after, committed_BC, active_BC & ~accept_BC & ~committed_BC)


@dataclass(frozen=True)
class Reviser:
    """A way to revise.

    Attributes:
        apply: (state, accepted, proposal, settings, noise) → the outcome of a call.
        rereads: whether it asks what the network says of the current block's committed tokens; they then go through
            the head as well.
    """

    apply: Callable[[State, Tensor, Proposal, SamplerSettings, Noise], Revision]
    rereads: bool = False


REVISERS: dict[str, Reviser] = {
    "none": Reviser(commit),
    "remask": Reviser(remask, rereads=True),
    "edit": Reviser(edit, rereads=True),
    "redraw": Reviser(redraw),
}
