"""What a step does under each kind of noise: masks that are filled for good, or random tokens that are drawn anew.

Both serve the one loop of `denoise.py`: `begin` writes the noise of a block, `weigh` says what logits mean, a rule of
`rules.py` picks the positions that take their candidate, `revise` makes the next answer of it and says what is settled.

Shapes: B rows, C answer positions, M open positions of the rows' current blocks, V vocabulary rows, J blocks, K calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.sampling.categorical import block_sums
from unmask.sampling.draws import Draws, Places
from unmask.sampling.rules import SCORES, ban, choose
from unmask.sampling.scratch import Scratch
from unmask.sampling.settings import CanvasSettings, MaskSettings, block_quotas
from unmask.sampling.state import State, Tokens

# Logit of a banned token of a canvas: finite, so that p · log p is 0 and not nan.
_NEVER = -1e30
# Weights below e^-60 of the highest are raised to it. All of a vocabulary's together they are too few for the smallest
# uniform number (2^-53) to fall on one, or for fp32 to see; without it they underflow to subnormal numbers, with which
# a CPU multiplies matrices ten times slower.
_LOWEST = -60.0


@dataclass(frozen=True)
class Weighed:
    """What the logits say of some positions, on their device.

    Attributes:
        candidate_M: int64, the token that each would take.
        likely_M: int64, the most likely token.
        score_M: float32, how urgently it takes it, larger first.
        weights_MV: float32, the probabilities times `total_M`, where a network conditions on them; otherwise None.
            Valid until the next positions are weighed.
        total_M: float32, what the weights add up to.
    """

    candidate_M: Tensor
    likely_M: Tensor
    score_M: Tensor
    weights_MV: Tensor | None = None
    total_M: Tensor | None = None


@dataclass(frozen=True)
class Proposal:
    """The weighed positions of all rows in their places; tensors (B, C) on the CPU, -inf as the score elsewhere."""

    candidate_BC: Tensor
    likely_BC: Tensor
    score_BC: Tensor


class Process(Protocol):
    """One kind of noise."""

    def begin(self, state: State, begins_B: Tensor) -> State:
        """Return the state with noise in the current block of the rows where `begins_B` is True."""
        ...

    def quota(self, state: State) -> Tensor:
        """Return how many positions of each row this call may settle, int64 (B,), for the rules that count."""
        ...

    def weigh(self, logits_MV: Tensor, places: Places, step_M: Tensor) -> Weighed:
        """Return what logits mean at call number `step_M` of their blocks; the logits may be overwritten."""
        ...

    def revise(self, state: State, accept_BC: Tensor, proposal: Proposal) -> tuple[State, Tensor]:
        """Return the state with its next answer, and the positions that are settled by this call, bool (B, C)."""
        ...


class MaskProcess:
    """Absorbing noise: open positions hold the mask, and a position that takes its candidate is settled."""

    def __init__(self, settings: MaskSettings, tokens: Tokens, vocab_size: int, draws: Draws) -> None:
        self.settings, self.tokens, self.vocab_size, self.draws = settings, tokens, vocab_size, draws
        quotas = block_quotas(settings)
        calls = max(len(block) for block in quotas)
        # Tokens that call k of block j settles, 0 after a block's last call.
        self.quota_JK = torch.tensor([[*block, *[0] * (calls - len(block))] for block in quotas])

    def begin(self, state: State, begins_B: Tensor) -> State:
        """Return the state: an answer is masks from the start."""
        return state

    def quota(self, state: State) -> Tensor:
        """As in `Process`."""
        return self.quota_JK[state.block_B, state.step_B.clamp(max=self.quota_JK.shape[1] - 1)]

    def weigh(self, logits_MV: Tensor, places: Places, step_M: Tensor) -> Weighed:
        """Draw only the noise that the settings need."""
        settings = self.settings
        logits_MV = ban(logits_MV, self.tokens.banned, self.vocab_size)
        gumbel_MV = self.draws.gumbel(places, logits_MV) if settings.temperature else None
        token_M = choose(logits_MV, settings.temperature, gumbel_MV)
        score = SCORES[settings.remasking]
        score_M = score.measure(logits_MV, token_M, self.draws.order(places, logits_MV) if score.random else None)
        if self.tokens.deferred:
            deferred = torch.tensor(self.tokens.deferred, device=token_M.device)
            score_M = score_M.masked_fill(torch.isin(token_M, deferred), -torch.inf)
        return Weighed(token_M, token_M, score_M)

    def revise(self, state: State, accept_BC: Tensor, proposal: Proposal) -> tuple[State, Tensor]:
        """Settle what is accepted."""
        answer_BC = torch.where(accept_BC, proposal.candidate_BC, state.answer_BC)
        return replace(state, answer_BC=answer_BC), accept_BC


class CanvasProcess:
    """Uniform noise: accepted positions hold their candidates, all others are drawn anew, and nothing is latched.

    The most likely tokens of the whole canvas are settled when it stops: stable and certain, or after its last call.
    Source: transformers, generation_diffusion_gemma.py.
    """

    def __init__(self, settings: CanvasSettings, tokens: Tokens, vocab_size: int, draws: Draws) -> None:
        self.settings, self.tokens, self.vocab_size, self.draws = settings, tokens, vocab_size, draws
        self._weights = Scratch()
        self.temperature_K = torch.tensor([settings.temperature(step) for step in range(settings.steps)])

    def begin(self, state: State, begins_B: Tensor) -> State:
        """Fill the blocks with tokens drawn uniformly; what the call before said is of another block."""
        begins_BC = state.active_BC & begins_B[:, None]
        answer_BC = torch.where(begins_BC, self._noise(state, begins_BC), state.answer_BC)
        return replace(state, answer_BC=answer_BC, stable_B=state.stable_B.masked_fill(begins_B, 0))

    def quota(self, state: State) -> Tensor:
        """Return zeros: the rule goes by entropy."""
        return torch.zeros_like(state.step_B)

    def weigh(self, logits_MV: Tensor, places: Places, step_M: Tensor) -> Weighed:
        """Weigh softmax(logits / T), overwriting the logits: this is the bulk of a step beside the matmuls."""
        logits_MV = logits_MV.float().div_(self.temperature_K[step_M].to(logits_MV.device)[:, None])
        logits_MV[:, self.vocab_size :] = _NEVER
        for token in self.tokens.banned:
            logits_MV[:, token : token + 1] = _NEVER
        highest_M, likely_M = logits_MV.max(dim=-1)
        logits_MV.sub_(highest_M[:, None]).clamp_(min=_LOWEST)
        weights_MV = torch.exp(logits_MV, out=self._weights.rows(*logits_MV.shape, like=logits_MV))
        total_M = block_sums(weights_MV).sum(dim=-1)
        # H = log Z − Σ p·x with x relative to the highest, so that a sure position's entropy keeps its digits.
        entropy_M = total_M.log() - logits_MV.mul_(weights_MV).sum(dim=-1) / total_M
        return Weighed(self.draws.category(places, weights_MV), likely_M, -entropy_M, weights_MV, total_M)

    def revise(self, state: State, accept_BC: Tensor, proposal: Proposal) -> tuple[State, Tensor]:
        """Keep what is accepted and draw the rest anew, or settle the most likely tokens where a canvas stops."""
        settings, active_BC = self.settings, state.active_BC
        same_B = ((proposal.likely_BC == state.likely_BC) | ~active_BC).all(dim=1)
        stable_B = torch.where(same_B, state.stable_B + 1, 0)
        entropy_B = -proposal.score_BC.masked_fill(~active_BC, 0).sum(dim=1) / active_BC.sum(dim=1)
        sure_B = (stable_B >= settings.stability_threshold) & (entropy_B < settings.confidence_threshold)
        settled_BC = active_BC & (sure_B | (state.step_B + 1 >= settings.steps))[:, None]
        # The numbers are those of the next call, which sees them; a block's first were those of the first.
        noise_BC = self._noise(replace(state, nfe_B=state.nfe_B + 1), active_BC)
        answer_BC = torch.where(active_BC & ~accept_BC, noise_BC, state.answer_BC)
        answer_BC = torch.where(accept_BC, proposal.candidate_BC, answer_BC)
        answer_BC = torch.where(settled_BC, proposal.likely_BC, answer_BC)
        likely_BC = torch.where(active_BC, proposal.likely_BC, state.likely_BC)
        return replace(state, answer_BC=answer_BC, likely_BC=likely_BC, stable_B=stable_B), settled_BC

    def _noise(self, state: State, where_BC: Tensor) -> Tensor:
        rows_M, position_M = where_BC.nonzero(as_tuple=True)
        places = Places(state.key_B[rows_M], state.nfe_B[rows_M], position_M)
        noise_M = self.draws.noise(places, self.vocab_size)
        return torch.zeros_like(state.answer_BC).index_put((rows_M, position_M), noise_M)


# Kind of noise, as a family's spec names it → its process: (settings, tokens, vocab_size, draws).
PROCESSES: dict[str, Callable[[Any, Tokens, int, Draws], Process]] = {
    "mask": MaskProcess,
    "uniform": CanvasProcess,
}
