"""The kinds of noise: what stands at open positions, and what logits mean there.

Both serve the one loop of `denoise.py`: `begin` writes the noise of a block, `weigh` says what logits mean; then a rule
of `rules.py` picks the positions that take their candidate, and a way of `revise.py` makes the next answer of it.

Shapes: B rows, C answer columns, M weighed positions, V vocabulary rows, K calls of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.ops.categorical import block_sums
from unmask.ops.chunks import cached_rows
from unmask.sampling.engine.draws import Draws, Places
from unmask.sampling.engine.revise import REVISERS
from unmask.sampling.engine.rules import SCORES, Candidates, ban_, choose, likeliest, log_total, logit
from unmask.sampling.engine.schedule import quota
from unmask.sampling.engine.scratch import Scratch
from unmask.sampling.engine.state import State, Tokens
from unmask.sampling.settings import CanvasSettings, MaskSettings

# Logit of a banned token of a canvas: finite, so that p · log p is 0 and not nan.
_NEVER = -1e30
# Weights below e^-60 of the highest are raised to it. All of a vocabulary's together they are too few for the smallest
# uniform number (2^-53) to fall on one, or for fp32 to see; without it they underflow to subnormal numbers, with which
# a CPU multiplies matrices ten times slower.
_LOWEST = -60.0


@dataclass(frozen=True)
class Weighing:
    """The positions that are weighed. All tensors are on the device of the logits, moved there once a step.

    Attributes:
        places: where their random numbers come from.
        step_M: int64, number of the call within its block.
        standing_M: int64, the token that stands there now.
    """

    places: Places
    step_M: Tensor
    standing_M: Tensor

    def __getitem__(self, part: slice) -> Weighing:
        """Return some of the positions."""
        return Weighing(self.places[part], self.step_M[part], self.standing_M[part])


@dataclass(frozen=True)
class Weighed:
    """What the logits say of some positions, on their device.

    Attributes:
        finite_M: bool, whether all logits are finite; where not, nothing else is of use.
        candidate_M: int64, the token that each would take.
        likely_M: int64, the most likely token.
        score_M: float32, how urgently it takes it, larger first.
        confidence_M: float32, probability of the candidate; of a canvas, of the most likely token.
        standing_M: float32, probability of the token that stands there, where settled tokens are read again; else None.
        highest_M: float32, probability of the most likely token, likewise.
        weights_MV: float32, the probabilities times `total_M`, where a network conditions on them; otherwise None.
            Valid until the next positions are weighed.
        total_M: float32, what the weights add up to.
    """

    finite_M: Tensor
    candidate_M: Tensor
    likely_M: Tensor
    score_M: Tensor
    confidence_M: Tensor
    standing_M: Tensor | None = None
    highest_M: Tensor | None = None
    weights_MV: Tensor | None = None
    total_M: Tensor | None = None

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """What there is one of a position, in the order above; zeros for what is None."""
        nothing_M = torch.zeros_like(self.confidence_M)
        read_again = (nothing_M if read_M is None else read_M for read_M in (self.standing_M, self.highest_M))
        return self.finite_M, self.candidate_M, self.likely_M, self.score_M, self.confidence_M, *read_again


def _joined(parts: Sequence[Weighed]) -> Weighed:
    columns = ([getattr(part, field.name) for part in parts] for field in fields(Weighed))
    return Weighed(*(None if column[0] is None else torch.cat(column) for column in columns))  # pyright: ignore[reportArgumentType]


class Process(Protocol):
    """One kind of noise."""

    def begin(self, state: State) -> State:
        """Return the state with noise in the blocks that begin, which are those of rows with `step_B` 0."""
        ...

    def quota(self, state: State) -> Tensor:
        """Return how many positions of each row this call may settle, int64 (B,), for the rules that count."""
        ...

    def weigh(self, logits_MV: Tensor, weighing: Weighing) -> Weighed:
        """Return what logits mean; they may be overwritten."""
        ...

    def noise(self, state: State, where_BC: Tensor) -> Tensor:
        """Return what stands at open positions where nothing is accepted, int64 (B, C); elsewhere any."""
        ...


class MaskProcess:
    """Absorbing noise: open positions hold the mask."""

    def __init__(
        self, settings: MaskSettings, tokens: Tokens, vocab_size: int, draws: Draws, untempered: bool = False
    ) -> None:
        self.settings, self.tokens, self.vocab_size, self.draws = settings, tokens, vocab_size, draws
        self.rereads = REVISERS[settings.revise].rereads
        self._floats = Scratch()

    def begin(self, state: State) -> State:
        """Return the state: open positions are masks from the start."""
        return state

    def quota(self, state: State) -> Tensor:
        """As in `Process`, by the row's own schedule."""
        within_BC = state.within_BC
        sizes = (within_BC & ~state.given_BC).sum(dim=1).tolist()
        calls = state.calls_BC.masked_fill(~within_BC, 0).amax(dim=1).tolist()
        return torch.tensor([quota(*row) for row in zip(sizes, calls, state.step_B.tolist(), strict=True)])

    def weigh(self, logits_MV: Tensor, weighing: Weighing) -> Weighed:
        """As in `Process`."""
        return _joined([self._weigh_few(logits_MV[part], weighing[part]) for part in cached_rows(logits_MV)])

    def _score(
        self, logits_MV: Tensor, token_M: Tensor, total_M: Tensor, confidence_M: Tensor, weighing: Weighing
    ) -> Tensor:
        """Return how urgently each position takes its token; logits are for scores that read them."""
        score, places = SCORES[self.settings.score], weighing.places
        uniform_M = self.draws.order(places, logits_MV) if score.random else None
        score_M = score.measure(Candidates(logits_MV, total_M, confidence_M, places.position_M, uniform_M)).float()
        return score_M.masked_fill(self._deferred(token_M), -torch.inf) if self.tokens.deferred else score_M

    def _weigh_few(self, logits_MV: Tensor, weighing: Weighing) -> Weighed:
        settings, places, score = self.settings, weighing.places, SCORES[self.settings.score]
        if logits_MV.dtype != torch.float32:
            floats_MV = self._floats.rows(*logits_MV.shape, like=logits_MV, dtype=torch.float32)
            logits_MV = floats_MV.copy_(logits_MV)
        finite_M = logits_MV.sum(dim=-1).isfinite()
        ban_(logits_MV, self.tokens.banned, self.vocab_size)
        gumbel_MV = self.draws.gumbel(places, logits_MV) if settings.temperature else None
        token_M = choose(logits_MV, settings.temperature, gumbel_MV)
        candidate_M = logit(logits_MV, token_M)
        total_M = log_total(logits_MV, overwrite=not (score.reads_logits or self.rereads))
        confidence_M = (candidate_M - total_M).exp()
        score_M = self._score(logits_MV, token_M, total_M, confidence_M, weighing)
        if not self.rereads:
            return Weighed(finite_M, token_M, token_M, score_M, confidence_M)
        likely_M = choose(logits_MV, 0.0, None)
        highest_M = (logit(logits_MV, likely_M) - total_M).exp()
        if self.tokens.deferred:
            highest_M = highest_M.masked_fill(self._deferred(likely_M), 0.0)  # no edit writes a stop token
        standing_M = (logit(logits_MV, weighing.standing_M) - total_M).exp()
        return Weighed(finite_M, token_M, likely_M, score_M, confidence_M, standing_M, highest_M)

    def noise(self, state: State, where_BC: Tensor) -> Tensor:
        """Return masks."""
        assert self.tokens.mask is not None
        return torch.full_like(state.answer_BC, self.tokens.mask)

    def _deferred(self, token_M: Tensor) -> Tensor:
        return torch.isin(token_M, torch.tensor(self.tokens.deferred, device=token_M.device))


class CanvasProcess:
    """Uniform noise: open positions hold random tokens, drawn anew until a candidate is accepted."""

    def __init__(
        self, settings: CanvasSettings, tokens: Tokens, vocab_size: int, draws: Draws, untempered: bool = False
    ) -> None:
        self.untempered = untempered
        self.settings, self.tokens, self.vocab_size, self.draws = settings, tokens, vocab_size, draws
        self._weights = Scratch()
        self.temperature_K = torch.tensor([settings.temperature(step) for step in range(settings.steps)])

    def begin(self, state: State) -> State:
        """Fill the blocks with tokens drawn uniformly; what the call before said is of another block."""
        begins_B = state.step_B == 0
        begins_BC = state.active_BC & begins_B[:, None]
        if not begins_BC.any():
            return state
        answer_BC = torch.where(begins_BC, self.noise(state, begins_BC), state.answer_BC)
        return replace(state, answer_BC=answer_BC, stable_B=state.stable_B.masked_fill(begins_B, 0))

    def quota(self, state: State) -> Tensor:
        """Return zeros: the rule goes by entropy."""
        return torch.zeros_like(state.step_B)

    def weigh(self, logits_MV: Tensor, weighing: Weighing) -> Weighed:
        """Weigh softmax(logits / T), overwriting the logits: this is the bulk of a step beside the matmuls."""
        self.temperature_K = self.temperature_K.to(logits_MV.device)
        logits_MV = logits_MV.float()
        weights_MV = self._weights.rows(*logits_MV.shape, like=logits_MV)
        parts = cached_rows(logits_MV)
        found = _joined([self._weigh_few(logits_MV[part], weights_MV[part], weighing[part]) for part in parts])
        return replace(found, weights_MV=weights_MV)

    def _weigh_few(self, logits_MV: Tensor, weights_MV: Tensor, weighing: Weighing) -> Weighed:
        """Weigh some positions, writing their weights."""
        highest_M = self._highest(logits_MV, weights_MV) if self.untempered else None
        logits_MV = logits_MV.div_(self.temperature_K[weighing.step_M][:, None])
        finite_M = logits_MV.sum(dim=-1).isfinite()
        logits_MV[:, self.vocab_size :] = _NEVER
        for token in self.tokens.banned:
            logits_MV[:, token : token + 1] = _NEVER
        likely_M = likeliest(logits_MV)
        logits_MV.sub_(logit(logits_MV, likely_M)[:, None]).clamp_(min=_LOWEST)
        torch.exp(logits_MV, out=weights_MV)
        total_M = block_sums(weights_MV).sum(dim=-1)
        # H = log Z − Σ p·x with x relative to the highest, so that a sure position's entropy keeps its digits.
        entropy_M = total_M.log() - logits_MV.mul_(weights_MV).sum(dim=-1) / total_M
        return Weighed(
            finite_M,
            self.draws.category(weighing.places, weights_MV),
            likely_M,
            -entropy_M,
            total_M.reciprocal() if highest_M is None else highest_M,  # the highest weight is 1
            total_M=total_M,
        )

    def _highest(self, logits_MV: Tensor, scratch_MV: Tensor) -> Tensor:
        """Return the highest probability at temperature 1, leaving the logits as they are."""
        scratch_MV.copy_(logits_MV)
        ban_(scratch_MV, self.tokens.banned, self.vocab_size)
        return (scratch_MV.amax(dim=-1) - log_total(scratch_MV)).exp()

    def noise(self, state: State, where_BC: Tensor) -> Tensor:
        """Return tokens drawn uniformly."""
        rows_M, position_M = where_BC.nonzero(as_tuple=True)
        places = Places(state.key_B[rows_M], state.nfe_B[rows_M], position_M)
        noise_M = self.draws.noise(places, self.vocab_size)
        return torch.zeros_like(state.answer_BC).index_put((rows_M, position_M), noise_M)


# Kind of noise, as a family's spec names it → its process: (settings, tokens, vocab_size, draws, untempered).
# `untempered` asks for confidences at temperature 1; under masks they always are.
PROCESSES: dict[str, Callable[[Any, Tokens, int, Draws, bool], Process]] = {
    "mask": MaskProcess,
    "uniform": CanvasProcess,
}
