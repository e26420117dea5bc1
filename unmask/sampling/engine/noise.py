"""The kinds of noise in the denoising loop: what masked positions hold, and how logits become predictions there.

A rule of `rules.py` then picks the positions to commit, and a reviser makes the next answer.

Shapes: B rows, C answer columns, M scored positions, V vocabulary rows, D width, K calls of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from unmask.ops.categorical import block_sums
from unmask.ops.chunks import cached_rows
from unmask.sampling.engine.draws import Draws
from unmask.sampling.engine.rules import REVISERS, SCORES, ScoreInputs, argmax, ban_, logit, sample
from unmask.sampling.engine.state import Positions, State, Tokens, send
from unmask.sampling.settings import SamplerSettings

# Logit of a banned token of a canvas: finite, so that p · log p is 0 and not nan.
_NEVER = -1e30
# Weights below e^-60 of the highest are raised to it: together still too small to be drawn (by multiples of 2^-53) or
# seen in fp32, but not subnormal, with which a CPU multiplies matrices ten times slower.
_LOWEST = -60.0

# (weights_MV, total_M) → a network's self-conditioning input in its next call, (M, D), of p = weights / total.
SelfConditioning = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Predictions:
    """What the logits predict at some positions, on their device; tokens are int64, probabilities float32."""

    finite_M: Tensor  # bool, whether all logits are finite; where not, the rest is meaningless
    sample_M: Tensor  # the token that each would take
    argmax_M: Tensor  # the most likely token
    score_M: Tensor  # float32, by which rules rank positions, highest first
    confidence_M: Tensor  # probability of the sample; of a canvas, of the most likely token
    current_M: Tensor  # probability of the current token; 0 unless the reviser rereads committed tokens
    highest_M: Tensor  # probability of the most likely token; 0 likewise
    conditioning_MD: Tensor | None = None  # the network's self-conditioning input in its next call

    @staticmethod
    def concat(parts: Sequence[Predictions]) -> Predictions:
        """Concatenate the predictions of several parts."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Predictions))
        return Predictions(*(None if column[0] is None else torch.cat(column) for column in columns))  # pyright: ignore[reportArgumentType]

    def to_host(self) -> Predictions:
        """Return the same on the CPU, without the conditioning, which is the network's."""
        columns = [getattr(self, field.name) for field in fields(self) if field.name != "conditioning_MD"]
        return Predictions(*send(columns, torch.device("cpu")))


class Process(Protocol):
    """One kind of noise, made of (settings, tokens, draws, untempered, conditioning).

    `untempered` asks for confidences at temperature 1; `conditioning` is `Backend.self_conditioning`.
    """

    def begin(self, state: State) -> State:
        """Return the state with noise written into blocks that begin: those of rows with `step_B` 0."""
        ...

    def quota(self, state: State) -> Tensor:
        """Return how many positions of each row this call commits under the rule `quota`, int64 (B,)."""
        ...

    def predict(self, logits_MV: Tensor, positions: Positions) -> Predictions:
        """Return the predictions of logits, which may be overwritten."""
        ...

    def noise(self, state: State, where_BC: Tensor) -> Tensor:
        """Return fresh noise where `where_BC` is True, int64 (B, C); elsewhere any value."""
        ...


@dataclass(frozen=True)
class MaskProcess:
    """Absorbing noise: masked positions hold the mask."""

    settings: SamplerSettings
    tokens: Tokens
    draws: Draws
    untempered: bool = False
    conditioning: SelfConditioning | None = None

    def begin(self, state: State) -> State:
        """Return the state: masked positions hold masks from the start."""
        return state

    def quota(self, state: State) -> Tensor:
        """As in `Process`, by each row's plan of calls."""
        within_BC = state.within_BC
        sizes = (within_BC & ~state.given_BC).sum(dim=1).tolist()
        calls = state.calls_BC.masked_fill(~within_BC, 0).amax(dim=1).tolist()
        return torch.tensor([quota(*row) for row in zip(sizes, calls, state.step_B.tolist(), strict=True)])

    def predict(self, logits_MV: Tensor, positions: Positions) -> Predictions:
        """As in `Process`; the temperature affects the sample alone, not scores or confidences."""
        return Predictions.concat([self._part(logits_MV[part], positions[part]) for part in cached_rows(logits_MV)])

    def _part(self, logits_MV: Tensor, positions: Positions) -> Predictions:
        settings, logits_MV = self.settings, logits_MV.float()
        assert settings.remasking is not None
        score = SCORES[settings.remasking]
        finite_M = logits_MV.sum(dim=-1).isfinite()
        ban_(logits_MV, self.tokens.banned, self.tokens.vocab_size)
        temperature = settings.temperature or 0.0
        sample_M = sample(logits_MV, temperature, self.draws.gumbel(positions, logits_MV) if temperature else None)
        sampled_M = logit(logits_MV, sample_M)
        total_M = logits_MV.logsumexp(dim=-1)
        confidence_M = (sampled_M - total_M).exp()
        uniform_M = self.draws.order(positions, logits_MV) if score.random else None
        inputs = ScoreInputs(logits_MV, total_M, confidence_M, positions.column_M, uniform_M)
        score_M = self._defer(sample_M, score.measure(inputs).float(), -torch.inf)
        zero_M = torch.zeros_like(confidence_M)
        predictions = Predictions(finite_M, sample_M, sample_M, score_M, confidence_M, zero_M, zero_M)
        if not REVISERS[settings.revise].rereads:
            return predictions
        argmax_M = argmax(logits_MV)
        highest_M = (logit(logits_MV, argmax_M) - total_M).exp()
        return replace(
            predictions,
            argmax_M=argmax_M,
            highest_M=self._defer(argmax_M, highest_M, 0.0),  # so that no edit writes a deferred token
            current_M=(logit(logits_MV, positions.current_M) - total_M).exp(),
        )

    def _defer(self, token_M: Tensor, value_M: Tensor, least: float) -> Tensor:
        """Return the values, `least` where the token is a deferred one (`eos: defer`)."""
        if not self.tokens.deferred:
            return value_M
        # Compared with numbers: a tensor of them would have to be sent to the device.
        is_deferred_M = functools.reduce(torch.logical_or, (token_M == deferred for deferred in self.tokens.deferred))
        return value_M.masked_fill(is_deferred_M, least)

    def noise(self, state: State, where_BC: Tensor) -> Tensor:
        """Return masks."""
        assert self.tokens.mask is not None
        return torch.full_like(state.answer_BC, self.tokens.mask)


def quota(size: int, calls: int, step: int) -> int:
    """Return how many positions call number `step` (from 0) of a block commits: size // calls, the first ones one more.

    Over the planned calls the quotas add up to `size`. Calls beyond the plan, which only revised positions ask for,
    commit size // calls.
    """
    return size // calls + (step < size % calls)


@functools.lru_cache(maxsize=8)
def temperatures(settings: SamplerSettings, device: torch.device) -> Tensor:
    """Return the temperature of each call of a block, float32 (K,); kept, so that it is sent to the device once."""
    return torch.tensor([settings.temperature_at(step) for step in range(settings.steps)]).to(device)


@dataclass(frozen=True)
class UniformProcess:
    """Uniform noise: masked positions hold random tokens, drawn anew until a sample is accepted."""

    settings: SamplerSettings
    tokens: Tokens
    draws: Draws
    untempered: bool = False
    conditioning: SelfConditioning | None = None

    def begin(self, state: State) -> State:
        """As in `Process`; also restarts the count of calls with stable predictions."""
        begins_B = state.step_B == 0
        begins_BC = state.active_BC & begins_B[:, None]
        if not begins_BC.any():
            return state
        answer_BC = torch.where(begins_BC, self.noise(state, begins_BC), state.answer_BC)
        return replace(state, answer_BC=answer_BC, stable_B=state.stable_B.masked_fill(begins_B, 0))

    def quota(self, state: State) -> Tensor:
        """Return zeros: canvases have the rule `entropy_bound`."""
        return torch.zeros_like(state.step_B)

    def predict(self, logits_MV: Tensor, positions: Positions) -> Predictions:
        """As in `Process`, by softmax(logits / T), in place: the bulk of a call beside the matmuls."""
        logits_MV = logits_MV.float()
        temperature_M = temperatures(self.settings, logits_MV.device)[positions.step_M]
        weights_MV = torch.empty_like(logits_MV)
        parts, totals = [], []
        for part in cached_rows(logits_MV):
            predictions, total_M = self._part(logits_MV[part], weights_MV[part], temperature_M[part], positions[part])
            parts.append(predictions)
            totals.append(total_M)
        predictions = Predictions.concat(parts)
        if self.conditioning is None:
            return predictions
        return replace(predictions, conditioning_MD=self.conditioning(weights_MV, torch.cat(totals)))

    def _part(
        self, logits_MV: Tensor, weights_MV: Tensor, temperature_M: Tensor, positions: Positions
    ) -> tuple[Predictions, Tensor]:
        """Write exp(logit − highest) of some positions to `weights_MV`; return predictions, and sums of weights."""
        confidence_M = self._highest(logits_MV) if self.untempered else None
        logits_MV = logits_MV.div_(temperature_M[:, None])
        finite_M = logits_MV.sum(dim=-1).isfinite()
        ban_(logits_MV, self.tokens.banned, self.tokens.vocab_size, _NEVER)
        argmax_M = argmax(logits_MV)
        logits_MV.sub_(logit(logits_MV, argmax_M)[:, None]).clamp_(min=_LOWEST)
        torch.exp(logits_MV, out=weights_MV)
        total_M = block_sums(weights_MV).sum(dim=-1)
        # H = log Z − Σ p·x with x relative to the highest, so that small entropies keep their digits.
        entropy_M = total_M.log() - logits_MV.mul_(weights_MV).sum(dim=-1) / total_M
        sample_M = self.draws.category(positions, weights_MV)
        confidence_M = total_M.reciprocal() if confidence_M is None else confidence_M  # the highest weight is 1
        zero_M = torch.zeros_like(total_M)
        return Predictions(finite_M, sample_M, argmax_M, -entropy_M, confidence_M, zero_M, zero_M), total_M

    def _highest(self, logits_MV: Tensor) -> Tensor:
        """Return the highest probability at temperature 1; does not change the logits."""
        logits_MV = ban_(logits_MV.clone(), self.tokens.banned, self.tokens.vocab_size)
        return (logits_MV.amax(dim=-1) - logits_MV.logsumexp(dim=-1)).exp()

    def noise(self, state: State, where_BC: Tensor) -> Tensor:
        """Return tokens drawn uniformly."""
        rows_M, column_M = where_BC.nonzero(as_tuple=True)
        noise_M = self.draws.noise(state.positions(where_BC), self.tokens.vocab_size)
        return torch.zeros_like(state.answer_BC).index_put((rows_M, column_M), noise_M)


# Kind of noise → its process.
PROCESSES: dict[str, Callable[[SamplerSettings, Tokens, Draws, bool, SelfConditioning | None], Process]] = {
    "mask": MaskProcess,
    "uniform": UniformProcess,
}
