"""The denoising loop: every answer begins as noise and is settled block by block, from left to right.

One loop serves every family and every setting: the adapter computes logits, the kind of noise (`process`) and a rule
(`rules`) say what they mean, and each network call ends in a `StepEvent`, from which views draw and results are read.

Bookkeeping lives on the CPU: it is a few numbers a row, and there it costs one wait for the device a step.

Shapes: B rows, C answer positions, M open positions of the rows' current blocks, V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.errors import SamplingError
from unmask.sampling.adapters import Adapter
from unmask.sampling.draws import Draws, KeyedDraws, Places
from unmask.sampling.process import PROCESSES, Process, Proposal
from unmask.sampling.rules import RULES
from unmask.sampling.settings import Settings
from unmask.sampling.state import State, Tokens

# Logits weighed at a time on a CPU (64 MiB in fp32); four times as many elsewhere, where a matrix is read faster and
# a call takes longer to start.
_LOGITS_AT_ONCE = 2**24


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
        begun_B: int64 (B,), where that block ends: positions from there on have not begun.
        step_B: int64 (B,), the call's number within that block, from 0.
        nfe_B: int64 (B,), network calls each row has taken part in, this one included.
        answer_BC: int64 (B, C), the answers so far. At open positions: the mask, or the current block's noisy tokens.
        open_BC: bool (B, C), positions that are not settled yet. Only this says so: a given token may be a mask.
        committed_BC: bool (B, C), positions settled by this call.
        score_BC: float32 (B, C), the score of each position that the call weighed (the rule's: a probability, a random
            number or minus an entropy), otherwise -inf.
        finished_B: bool (B,), rows that are complete and leave: nothing is open, or nothing left of a stop token is.
    """

    rows: tuple[int, ...]
    block_B: Tensor
    begun_B: Tensor
    step_B: Tensor
    nfe_B: Tensor
    answer_BC: Tensor
    open_BC: Tensor
    committed_BC: Tensor
    score_BC: Tensor
    finished_B: Tensor


def special_tokens(adapter: Adapter, settings: Settings, stop_ids: Sequence[int]) -> Tokens:
    """Sort a model's and a tokenizer's special tokens by what the settings say of them."""
    spec = adapter.spec
    stop = tuple(sorted({*spec.eos_ids, *stop_ids}))
    # Families that pad with an end-of-text token mean the padding to be written, as the end of the text.
    banned = {token for token in spec.banned_ids if token not in stop or token == spec.mask_id}
    if settings.eos == "suppress":
        banned |= set(spec.eos_ids)
    return Tokens(stop, tuple(sorted(banned)), stop if settings.eos == "defer" else ())


def denoise(
    adapter: Adapter,
    requests: Sequence[Request],
    settings: Settings,
    stop_ids: Sequence[int] = (),
    draws: Draws | None = None,
) -> Iterator[StepEvent]:
    """Sample an answer to every request, all in one batch; yield an event after each network call.

    A row advances through its blocks at its own pace and leaves when it is finished, so its answer and its number of
    calls are those that it would have alone.

    Args:
        adapter: the model.
        requests: at least one; the padded prompt and the answer must fit the model.
        settings: the settings, of the adapter's family.
        stop_ids: tokens that end an answer beside the model's own end-of-text tokens.
        draws: where random numbers come from; None = the rows' own keys.

    Raises:
        SamplingError: logits that are not finite; names the block, the step and the prompts.
    """
    spec, tokens = adapter.spec, special_tokens(adapter, settings, stop_ids)
    process = PROCESSES[spec.noise](settings, tokens, spec.vocab_size, draws if draws is not None else KeyedDraws())
    state = _start(requests, settings, spec.mask_id)
    context = adapter.prefill([request.prompt_ids for request in requests])
    begins_B = torch.ones(len(requests), dtype=torch.bool)
    while state.rows:
        if begins_B.any():
            state = process.begin(state, begins_B)
        block_B, step_B, active_BC = state.block_B, state.step_B, state.active_BC
        proposal, context = _propose(adapter, context, state, active_BC, process)
        accept_BC = RULES[settings.rule](proposal.score_BC, active_BC, process.quota(state), settings)
        state, settled_BC = process.revise(state, accept_BC, proposal)

        completed_B = ~(active_BC & ~settled_BC).any(dim=1)
        state = replace(
            state,
            open_BC=state.open_BC & ~settled_BC,
            nfe_B=state.nfe_B + 1,
            step_B=torch.where(completed_B, 0, step_B + 1),
        )
        finished_B = _finished(state, tokens.stop)
        length = settings.max_new_tokens  # whole canvases are denoised; what is over the answer's length is not shown
        yield StepEvent(
            rows=state.rows,
            block_B=block_B,
            begun_B=((block_B + 1) * settings.block_size).clamp(max=length),
            step_B=step_B,
            nfe_B=state.nfe_B,
            answer_BC=state.answer_BC[:, :length],
            open_BC=state.open_BC[:, :length],
            committed_BC=settled_BC[:, :length],
            score_BC=proposal.score_BC[:, :length],
            finished_B=finished_B,
        )
        if finished_B.any():
            stays_B = ~finished_B
            state, context = state.take(stays_B), context.take(stays_B)
            block_B, completed_B = block_B[stays_B], completed_B[stays_B]
        if completed_B.any():
            context = adapter.commit(context, state.answer_BC, block_B, completed_B)
        begins_B = completed_B


def _start(requests: Sequence[Request], settings: Settings, mask_id: int | None) -> State:
    rows, length = len(requests), settings.length
    zeros_B = torch.zeros(rows, dtype=torch.long)
    return State(
        rows=tuple(request.index for request in requests),
        answer_BC=torch.full((rows, length), 0 if mask_id is None else mask_id),
        open_BC=torch.ones(rows, length, dtype=torch.bool),
        block_of_BC=(torch.arange(length) // settings.block_size).expand(rows, length),
        step_B=zeros_B,
        nfe_B=zeros_B,
        key_B=torch.tensor([request.key for request in requests]),
        likely_BC=torch.full((rows, length), -1),
        stable_B=zeros_B,
    )


@torch.no_grad()
def _propose(adapter: Adapter, context: Any, state: State, active_BC: Tensor, process: Process) -> tuple[Proposal, Any]:
    """Call the network; return what it says of the active positions, and the context with what it is told next."""
    rows_M, positions_M = active_BC.nonzero(as_tuple=True)
    hidden_MD = adapter.denoise(context, state.answer_BC, rows_M, positions_M)
    places = Places(state.key_B[rows_M], state.nfe_B[rows_M], positions_M)
    columns: list[tuple[Tensor, ...]] = []
    signals: list[Tensor] = []
    size = max(1, _LOGITS_AT_ONCE * (1 if adapter.device.type == "cpu" else 4) // adapter.spec.rows)
    for start in range(0, len(rows_M), size):
        part = slice(start, start + size)
        logits_MV = adapter.logits(hidden_MD[part])
        finite_M = logits_MV.sum(dim=-1, dtype=torch.float32).isfinite()  # one nan or inf makes the sum one
        weighed = process.weigh(logits_MV, places[part], state.step_B[rows_M[part]])
        if adapter.signal is not None and weighed.weights_MV is not None and weighed.total_M is not None:
            signals.append(adapter.signal(weighed.weights_MV, weighed.total_M))
        columns.append((weighed.candidate_M, weighed.likely_M, weighed.score_M, finite_M))
    candidate_M, likely_M, score_M, finite_M = (torch.cat(column).cpu() for column in zip(*columns, strict=True))
    _require_finite(finite_M, state, rows_M)
    if signals:
        context = context.told(torch.cat(signals))
    at = (rows_M, positions_M)
    scores_BC = torch.full(active_BC.shape, -torch.inf)
    proposal = Proposal(
        state.answer_BC.index_put(at, candidate_M),
        state.answer_BC.index_put(at, likely_M),
        scores_BC.index_put(at, score_M),
    )
    return proposal, context


def _require_finite(finite_M: Tensor, state: State, rows_M: Tensor) -> None:
    if not finite_M.all():
        rows = rows_M[~finite_M].unique().tolist()
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
