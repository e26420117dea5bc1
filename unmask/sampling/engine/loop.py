"""The denoising loop: every answer begins as noise and is settled block by block, from left to right.

One loop serves every family and every setting: the backend computes logits, the kind of noise (`process`) says what
they mean, a rule (`rules`) which positions take their candidate and a way to revise (`revise`) what becomes of the
others; each network call ends in a `StepEvent`, from which views draw and results are read.

Bookkeeping lives on the CPU: it is a few numbers a row, and there it costs one wait for the device a step.

Shapes: B rows, C answer columns, M weighed positions, V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from unmask.errors import SamplingError
from unmask.sampling.backends.backend import Backend, Call
from unmask.sampling.engine.draws import Draws, KeyedDraws, Places
from unmask.sampling.engine.noise import PROCESSES, Process, Weighed, Weighing
from unmask.sampling.engine.request import Request, starting_state
from unmask.sampling.engine.revise import REVISERS, Proposal
from unmask.sampling.engine.rules import RULES
from unmask.sampling.engine.state import State, Tokens
from unmask.sampling.settings import Settings

__all__ = ["Request", "StepEvent", "denoise", "special_tokens"]

# Logits made at a time on a CPU (64 MiB in fp32); four times as many elsewhere, where a matrix is read faster and
# a call takes longer to start. A CPU multiplies multiples of this many rows fastest.
_LOGITS_AT_ONCE = 2**24
_ROWS = 64


@dataclass(frozen=True)
class StepEvent:
    """What one network call settled, for the rows that took part in it. Tensors are on the CPU and stay as they are.

    Rows join and leave from one event to the next; `rows` says who they are.

    Attributes:
        rows: the requests' indices; the tensors' rows follow this order.
        lengths: answer columns of each row; what is behind them in the tensors is padding.
        block_B: int64 (B,), the block each row is in, from 0.
        begun_B: int64 (B,), where that block ends: positions from there on have not begun.
        step_B: int64 (B,), the call's number within that block, from 0.
        nfe_B: int64 (B,), network calls each row has taken part in, this one included.
        answer_BC: int64 (B, C), the answers so far. At open positions: the mask, or the current block's noisy tokens.
        masked_BC: bool (B, C), positions that are not settled yet. Only this says so: a given token may be a mask.
        committed_BC: bool (B, C), positions settled by this call.
        revised_BC: bool (B, C), positions that had a token which this call took back (masked again, drawn anew) or
            replaced.
        score_BC: float32 (B, C), the score of each open position that the call weighed (the rule's: a probability, a
            random number, minus an entropy, …), otherwise -inf.
        confidence_BC: float32 (B, C), probability of the token that each of these positions would take, whatever the
            score (of a canvas: of its most likely token, at the call's temperature); and of the token that a settled
            position was revised to; otherwise 0.
        finished_B: bool (B,), rows that are complete and leave: nothing is open, or nothing left of a stop token is.

    Example:
        >>> import torch, unmask
        >>> from unmask.models.llada.config import LLaDAConfig
        >>> from unmask.models.llada.model import LLaDA, initialise
        >>> model = LLaDA(LLaDAConfig(
        ...     d_model=16, n_heads=2, n_layers=1, mlp_hidden_size=16, vocab_size=32, embedding_size=32,
        ...     mask_token_id=31, eos_token_id=30, pad_token_id=30,
        ... ))
        >>> initialise(model, torch.Generator().manual_seed(0))
        >>> sampler = unmask.SamplerConfig(steps=2, max_new_tokens=4, remasking="left_to_right", eos="suppress")
        >>> for event in unmask.stream(model, [1, 2, 3], sampler=sampler):
        ...     print(event.rows, event.committed_BC[0].tolist(), event.masked_BC[0].tolist())
        (0,) [True, True, False, False] [False, False, True, True]
        (0,) [False, False, True, True] [False, False, False, False]
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    block_B: Tensor
    begun_B: Tensor
    step_B: Tensor
    nfe_B: Tensor
    answer_BC: Tensor
    masked_BC: Tensor
    committed_BC: Tensor
    revised_BC: Tensor
    score_BC: Tensor
    confidence_BC: Tensor
    finished_B: Tensor


def special_tokens(
    backend: Backend, settings: Settings, stop_ids: Sequence[int] = (), banned_ids: Sequence[int] = ()
) -> Tokens:
    """Sort a model's and a tokenizer's special tokens by what the settings say of them."""
    spec = backend.spec
    stop = tuple(sorted({*spec.eos_ids, *stop_ids}))
    # Families that pad with an end-of-text token mean the padding to be written, as the end of the text.
    banned = {token for token in spec.banned_ids if token not in stop or token == spec.mask_id}
    if settings.eos == "suppress":
        banned |= set(spec.eos_ids)
    return Tokens(stop, tuple(sorted(banned | set(banned_ids))), stop if settings.eos == "defer" else (), spec.mask_id)


def denoise(
    backend: Backend,
    requests: Iterable[Request],
    settings: Settings,
    stop_ids: Sequence[int] = (),
    draws: Draws | None = None,
    batch_size: int | None = None,
    banned_ids: Sequence[int] = (),
    untempered: bool = False,
    places: Sequence[str] | None = None,
) -> Iterator[StepEvent]:
    """Sample an answer to every request; yield an event after each network call.

    A row advances through its blocks at its own pace and leaves when it is finished, and the next request takes its
    place before the next call. So its answer and its number of calls are those that it would have alone.

    Args:
        backend: the model.
        requests: taken from as places become free; prompt and answer of each must fit the model.
        settings: the settings, of the backend's family.
        stop_ids: tokens that end an answer beside the model's own end-of-text tokens.
        draws: where random numbers come from; None = the rows' own keys.
        batch_size: rows denoised together at the most; None = all.
        banned_ids: tokens that are never written, beside the model's own.
        untempered: whether the events' confidence is at temperature 1 of a canvas, too, so that calls can be compared.
        places: what messages call the requests, by their indices; None = `prompt INDEX`.

    Raises:
        SamplingError: logits that are not finite; names the block, the step and the requests.
    """
    spec, tokens = backend.spec, special_tokens(backend, settings, stop_ids, banned_ids)
    draws = draws if draws is not None else KeyedDraws()
    process = PROCESSES[spec.noise](settings, tokens, spec.vocab_size, draws, untempered)
    reviser = REVISERS[settings.revise]
    queue, state, context = iter(requests), None, None
    while True:
        rows = 0 if state is None else len(state.rows)
        more = list(islice(queue, None if batch_size is None else batch_size - rows))
        if more:
            joining, taken_in = starting_state(more, settings, spec.mask_id), _prefill(backend, more)
            state = joining if state is None or not rows else state.join(joining)
            context = taken_in if not rows else backend.join(context, taken_in)
        if state is None or not state.rows:
            return
        state = process.begin(state)
        active_BC = state.active_BC
        weighed_BC = active_BC | state.revisable_BC if reviser.rereads else active_BC
        call = _call(state, weighed_BC, spec.logit_shift)
        proposal, context = _propose(backend, context, call, state, active_BC, weighed_BC, process, places)
        accept_BC = RULES[settings.rule](proposal.score_BC, active_BC, process.quota(state), settings)
        revision = reviser.apply(state, accept_BC, proposal, settings, process.noise)

        within_BC = state.within_BC
        state = revision.state.opened(revision.settled_BC, revision.remasked_BC)
        completed_B = ~(state.masked_BC & within_BC).any(dim=1)
        state = replace(state, nfe_B=state.nfe_B + 1, step_B=torch.where(completed_B, 0, call.step_B + 1))
        stopped_BC = _stopped(state, tokens.stop)
        finished_B = ~state.masked_BC.any(dim=1) | stopped_BC.any(dim=1)
        yield _event(state, call, revision.settled_BC, revision.revised_BC, proposal, finished_B)
        if settings.cuts:
            state = _cut(state, call, tokens.stop)
        first_B, end_B = call.first_B, call.end_B
        if finished_B.any():
            stays_B = ~finished_B
            state, context = state.take(stays_B), context.take(stays_B)
            first_B, end_B, completed_B = first_B[stays_B], end_B[stays_B], completed_B[stays_B]
        if completed_B.any():
            # What is given up to the next open block is settled, too.
            end_B = torch.where(completed_B, _block_starts(state), end_B)
            context = backend.commit(context, state.answer_BC, first_B, end_B, completed_B)


@torch.no_grad()
def _prefill(backend: Backend, requests: Sequence[Request]) -> Any:
    return backend.prefill([request.prompt_ids for request in requests])


def _block_starts(state: State) -> Tensor:
    return state.within_BC.long().argmax(dim=1)


def _call(state: State, weighed_BC: Tensor, logit_shift: int) -> Call:
    rows_M, positions_M = weighed_BC.nonzero(as_tuple=True)
    first_B = _block_starts(state)
    return Call(
        answer_BC=state.answer_BC,
        lengths=tuple(state.length_B.tolist()),
        block_B=state.block_B,
        first_B=first_B,
        end_B=first_B + state.within_BC.sum(dim=1),
        step_B=state.step_B,
        rows_M=rows_M,
        positions_M=positions_M - logit_shift,
    )


@torch.no_grad()
def _propose(
    backend: Backend,
    context: Any,
    call: Call,
    state: State,
    active_BC: Tensor,
    weighed_BC: Tensor,
    process: Process,
    places: Sequence[str] | None,
) -> tuple[Proposal, Any]:
    """Call the network; return what it says of the weighed positions, and the context with what it is told next."""
    at = rows_M, positions_M = weighed_BC.nonzero(as_tuple=True)
    hidden_MD, context = backend.denoise(context, call)
    weighing = Weighing(
        Places(state.key_B[rows_M], state.nfe_B[rows_M], positions_M).to(backend.device),
        state.step_B[rows_M].to(backend.device),
        state.answer_BC[at].to(backend.device),
    )
    columns: list[tuple[Tensor, ...]] = []
    signals: list[Tensor] = []
    for weighed in _weigh(backend, process, hidden_MD, weighing):
        if backend.signal is not None and weighed.weights_MV is not None and weighed.total_M is not None:
            signals.append(backend.signal(weighed.weights_MV, weighed.total_M))
        columns.append(weighed.columns)
    finite_M, *found = (torch.cat(column).cpu() for column in zip(*columns, strict=True))
    _require_finite(finite_M, state, rows_M, places)
    if signals:
        context = context.told(torch.cat(signals))
    candidate_M, likely_M, score_M, confidence_M, standing_M, highest_M = found
    zeros_BC = torch.zeros(active_BC.shape)
    proposal = Proposal(
        state.answer_BC.index_put(at, candidate_M),
        state.answer_BC.index_put(at, likely_M),
        zeros_BC.index_put(at, score_M).masked_fill(~active_BC, -torch.inf),
        zeros_BC.index_put(at, confidence_M).masked_fill(~active_BC, 0),
        zeros_BC.index_put(at, standing_M),
        zeros_BC.index_put(at, highest_M),
    )
    return proposal, context


def _weigh(backend: Backend, process: Process, hidden_MD: Tensor, weighing: Weighing) -> Iterator[Weighed]:
    """Yield what the head says of the positions, part by part; `weights_MV` of one is valid until the next."""
    size = max(1, _LOGITS_AT_ONCE * (1 if backend.device.type == "cpu" else 4) // backend.spec.rows)
    size = size // _ROWS * _ROWS or size
    for start in range(0, len(hidden_MD), size):
        part = slice(start, start + size)
        yield process.weigh(backend.logits(hidden_MD[part]), weighing[part])


def _require_finite(finite_M: Tensor, state: State, rows_M: Tensor, places: Sequence[str] | None) -> None:
    if not finite_M.all():
        rows = rows_M[~finite_M].unique().tolist()
        names = [f"prompt {index}" if places is None else places[index] for index in state.rows]
        found = [
            f"{names[row]} (block {int(state.block_B[row]) + 1}, step {int(state.step_B[row]) + 1})" for row in rows
        ]
        where = ", ".join(dict.fromkeys(found))  # several requests may be of one place
        raise SamplingError(
            f"logits are not finite at {where}; check the checkpoint for nan or inf, or load it with dtype float32"
        )


def _stopped(state: State, stop: Sequence[int]) -> Tensor:
    """Return bool (B, C): stop tokens that the sampler settled and that have nothing open to their left."""
    open_so_far_BC = (
        state.masked_BC.long().cumsum(dim=1) > 0
    )  # the position itself counts: a stop token must be settled
    return _stops(state, stop) & ~open_so_far_BC


def _stops(state: State, stop: Sequence[int]) -> Tensor:
    """Return bool (B, C): stop tokens that the sampler settled. Given ones are text."""
    is_stop_BC = torch.isin(state.answer_BC, torch.tensor(stop, dtype=torch.long))
    return is_stop_BC & ~state.masked_BC & ~state.given_BC


def _cut(state: State, call: Call, stop: Sequence[int]) -> State:
    """Return the state with rows that have settled a stop token no longer than the block that it is in."""
    ends_B = _stops(state, stop).any(dim=1)
    return replace(state, length_B=torch.where(ends_B, torch.minimum(state.length_B, call.end_B), state.length_B))


def _event(
    state: State, call: Call, settled_BC: Tensor, revised_BC: Tensor, proposal: Proposal, finished_B: Tensor
) -> StepEvent:
    edited_BC = revised_BC & ~state.masked_BC
    confidence_BC = torch.where(edited_BC, proposal.highest_BC, proposal.confidence_BC)
    width = int(state.shown_B.max())  # whole canvases are denoised; what is over the answer's length is not shown
    return StepEvent(
        rows=state.rows,
        lengths=tuple(state.shown_B.tolist()),
        block_B=call.block_B,
        begun_B=torch.minimum(call.end_B, state.shown_B),
        step_B=call.step_B,
        nfe_B=state.nfe_B,
        answer_BC=state.answer_BC[:, :width],
        masked_BC=state.masked_BC[:, :width],
        committed_BC=settled_BC[:, :width],
        revised_BC=revised_BC[:, :width],
        score_BC=proposal.score_BC[:, :width],
        confidence_BC=confidence_BC[:, :width],
        finished_B=finished_B,
    )
