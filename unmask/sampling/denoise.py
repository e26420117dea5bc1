"""The denoising loop: every answer begins as open positions and is settled block by block, from left to right.

One loop serves every family and every setting: the adapter computes logits, `rules` says what they mean, and each
network call ends in a `StepEvent`, from which views draw and results are read.

Bookkeeping lives on the CPU: it is a few numbers a row, and there it costs one wait for the device a step.

Shapes: B rows, C answer positions, M open positions of the rows' current blocks, V vocabulary rows, J blocks, K calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.errors import SamplingError
from unmask.sampling import draws
from unmask.sampling.adapters import Adapter
from unmask.sampling.rules import RULES, SCORES, ban, choose
from unmask.sampling.settings import SamplerConfig, block_quotas

# Float64 noise and fp32 probabilities are built for at most this many logits at a time (64 MiB in float64).
_LOGITS_AT_ONCE = 2**23


@dataclass(frozen=True)
class Request:
    """One answer to sample.

    Attributes:
        index: the caller's number for it, found again in the events.
        prompt_ids: given tokens before the answer.
        key: int64 that all its random numbers derive from (`draws.row_keys`).
    """

    index: int
    prompt_ids: list[int]
    key: int


@dataclass(frozen=True)
class StepEvent:
    """What one network call settled, for the rows that took part in it. Tensors are on the CPU and stay as they are.

    Attributes:
        rows: the requests' indices; the tensors' rows follow this order.
        block_B: int64 (B,), the block each row is in, from 0.
        step_B: int64 (B,), the call's number within that block, from 0.
        nfe_B: int64 (B,), network calls each row has taken part in, this one included.
        answer_BC: int64 (B, C), the answers so far, the mask token at open positions.
        open_BC: bool (B, C), positions that are not settled yet. Only this says so: a given token may be a mask.
        committed_BC: bool (B, C), positions settled by this call.
        score_BC: float32 (B, C), the score of each position that the call weighed, otherwise -inf.
        finished_B: bool (B,), rows that are complete and leave: nothing is open, or nothing left of a stop token is.
    """

    rows: tuple[int, ...]
    block_B: Tensor
    step_B: Tensor
    nfe_B: Tensor
    answer_BC: Tensor
    open_BC: Tensor
    committed_BC: Tensor
    score_BC: Tensor
    finished_B: Tensor


@dataclass(frozen=True)
class State:
    """The rows still being denoised; each step makes a new one. Tensors are on the CPU and never written in place.

    Attributes:
        rows, answer_BC, open_BC, nfe_B: as in `StepEvent`.
        block_of_BC: int64 (B, C), the block that each position belongs to.
        step_B: int64 (B,), calls made in the current block.
        key_B: int64 (B,), where each row's random numbers come from.
    """

    rows: tuple[int, ...]
    answer_BC: Tensor
    open_BC: Tensor
    block_of_BC: Tensor
    step_B: Tensor
    nfe_B: Tensor
    key_B: Tensor

    @property
    def block_B(self) -> Tensor:
        """The current block of each row: the first with an open position."""
        return self.block_of_BC.masked_fill(~self.open_BC, self.block_of_BC.shape[1]).amin(dim=1)

    def take(self, keep_B: Tensor) -> State:
        """Return the rows where `keep_B` is True."""
        rows = tuple(row for row, keep in zip(self.rows, keep_B.tolist(), strict=True) if keep)
        tensors = (self.answer_BC, self.open_BC, self.block_of_BC, self.step_B, self.nfe_B, self.key_B)
        return State(rows, *(tensor[keep_B] for tensor in tensors))


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


def special_tokens(adapter: Adapter, sampler: SamplerConfig, stop_ids: Sequence[int]) -> Tokens:
    """Sort a model's and a tokenizer's special tokens by what the settings say of them."""
    spec = adapter.spec
    stop = tuple(sorted({*spec.eos_ids, *stop_ids}))
    # Families that pad with an end-of-text token mean the padding to be written, as the end of the text.
    banned = {token for token in spec.banned_ids if token not in stop} | {spec.mask_id}
    if sampler.eos == "suppress":
        banned |= set(spec.eos_ids)
    return Tokens(stop, tuple(sorted(banned)), stop if sampler.eos == "defer" else ())


def denoise(
    adapter: Adapter, requests: Sequence[Request], sampler: SamplerConfig, stop_ids: Sequence[int] = ()
) -> Iterator[StepEvent]:
    """Sample an answer to every request, all in one batch; yield an event after each network call.

    A row advances through its blocks at its own pace and leaves when it is finished, so its answer and its number of
    calls are those that it would have alone.

    Args:
        adapter: the model.
        requests: at least one; the padded prompt and the answer must fit the model.
        sampler: the settings.
        stop_ids: tokens that end an answer beside the model's own end-of-text tokens.

    Raises:
        SamplingError: logits that are not finite; names the block, the step and the prompts.
    """
    tokens = special_tokens(adapter, sampler, stop_ids)
    quota_JK = _quota_table(sampler)
    state = _start(requests, sampler, adapter.spec.mask_id)
    context = adapter.prefill([request.prompt_ids for request in requests])
    while state.rows:
        block_B, step_B = state.block_B, state.step_B
        active_BC = state.open_BC & (state.block_of_BC == block_B[:, None])
        candidate_BC, score_BC = _propose(adapter, context, state, active_BC, sampler, tokens)
        quota_B = quota_JK[block_B, step_B.clamp(max=quota_JK.shape[1] - 1)]
        commit_BC = RULES[sampler.rule](score_BC, active_BC, quota_B, sampler)

        state = replace(
            state,
            answer_BC=torch.where(commit_BC, candidate_BC, state.answer_BC),
            open_BC=state.open_BC & ~commit_BC,
            nfe_B=state.nfe_B + 1,
        )
        completed_B = ~(active_BC & ~commit_BC).any(dim=1)
        state = replace(state, step_B=torch.where(completed_B, 0, step_B + 1))
        finished_B = _finished(state, tokens.stop)
        yield StepEvent(
            state.rows, block_B, step_B, state.nfe_B, state.answer_BC, state.open_BC, commit_BC, score_BC, finished_B
        )
        if completed_B.any():
            context = adapter.commit(context, state.answer_BC, block_B, completed_B)
        if finished_B.any():
            state, context = state.take(~finished_B), context.take(~finished_B)


def _start(requests: Sequence[Request], sampler: SamplerConfig, mask_id: int) -> State:
    rows, length = len(requests), sampler.max_new_tokens
    zeros_B = torch.zeros(rows, dtype=torch.long)
    return State(
        rows=tuple(request.index for request in requests),
        answer_BC=torch.full((rows, length), mask_id),
        open_BC=torch.ones(rows, length, dtype=torch.bool),
        block_of_BC=(torch.arange(length) // sampler.block_size).expand(rows, length),
        step_B=zeros_B,
        nfe_B=zeros_B,
        key_B=torch.tensor([request.key for request in requests]),
    )


def _quota_table(sampler: SamplerConfig) -> Tensor:
    """Return int64 (J, K): tokens that call k of block j settles, 0 after a block's last call."""
    quotas = block_quotas(sampler)
    calls = max(len(block) for block in quotas)
    return torch.tensor([[*block, *[0] * (calls - len(block))] for block in quotas])


@torch.no_grad()
def _propose(
    adapter: Adapter, context: Any, state: State, active_BC: Tensor, sampler: SamplerConfig, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Call the network; return each active position's candidate, int64 (B, C), and score, float32 (B, C)."""
    rows_M, positions_M = active_BC.nonzero(as_tuple=True)
    logits_MV = adapter.denoise(context, state.answer_BC, rows_M, positions_M)
    _require_finite(logits_MV, state, rows_M)

    def weigh(chunk: slice) -> tuple[Tensor, Tensor]:
        allowed_MV = ban(logits_MV[chunk], tokens.banned, adapter.spec.vocab_size)
        return _weigh(allowed_MV, sampler, state.key_B[rows_M[chunk]], state.nfe_B[rows_M[chunk]], positions_M[chunk])

    size = max(1, _LOGITS_AT_ONCE // logits_MV.shape[1])
    parts = [weigh(slice(start, start + size)) for start in range(0, len(rows_M), size)]
    candidate_M, score_M = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    if tokens.deferred:
        score_M = score_M.masked_fill(torch.isin(candidate_M, torch.tensor(tokens.deferred)), -torch.inf)
    candidate_BC = state.answer_BC.index_put((rows_M, positions_M), candidate_M)
    score_BC = torch.full(active_BC.shape, -torch.inf).index_put((rows_M, positions_M), score_M)
    return candidate_BC, score_BC


def _weigh(
    logits_MV: Tensor, sampler: SamplerConfig, key_M: Tensor, call_M: Tensor, position_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the candidates and scores of some positions, drawing only the noise that the settings need."""

    def keys(stream: int) -> Tensor:
        return draws.position_keys(key_M, stream, call_M, position_M).to(logits_MV.device)

    gumbel_MV = draws.gumbel(keys(draws.CANDIDATES), logits_MV.shape[1]) if sampler.temperature else None
    token_M = choose(logits_MV, sampler.temperature, gumbel_MV)
    score = SCORES[sampler.remasking]
    uniform_M = draws.uniform(keys(draws.ORDER), 1)[:, 0] if score.random else None
    return token_M, score.measure(logits_MV, token_M, uniform_M)


def _require_finite(logits_MV: Tensor, state: State, rows_M: Tensor) -> None:
    finite_M = logits_MV.sum(dim=-1, dtype=torch.float32).isfinite()  # one nan or inf makes the sum one
    if not finite_M.all():
        rows = rows_M[~finite_M.cpu()].unique().tolist()
        places = ", ".join(
            f"prompt {state.rows[row]} (block {int(state.block_B[row]) + 1}, step {int(state.step_B[row]) + 1})"
            for row in rows
        )
        raise SamplingError(
            f"logits are not finite at {places}; check the checkpoint for nan or inf, or load it with dtype float32"
        )


def _finished(state: State, stop: Sequence[int]) -> Tensor:
    """Return bool (B,): rows where nothing is open, or nothing to the left of a settled stop token."""
    stops_BC = torch.isin(state.answer_BC, torch.tensor(stop, dtype=torch.long))
    open_so_far_BC = state.open_BC.long().cumsum(dim=1) > 0  # the position itself counts: a stop token must be settled
    return ~state.open_BC.any(dim=1) | (stops_BC & ~open_so_far_BC).any(dim=1)
