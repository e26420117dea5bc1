"""The denoising loop: every answer begins as noise and is committed block by block, from left to right.

One loop serves every model and setting: the backend computes logits, the process (`noise`) turns them into predictions,
a rule (`rules`) picks the positions to commit, a reviser may take committed ones back. Each network call ends in a
`StepEvent`, from which views draw and results are read.

Shapes: B rows, C answer columns, M scored positions, V vocabulary rows, D width.
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
from unmask.sampling.engine.draws import Draws, KeyedDraws
from unmask.sampling.engine.noise import PROCESSES, Predictions, Process
from unmask.sampling.engine.rules import REVISERS, RULES, Proposal, Revision
from unmask.sampling.engine.state import Positions, Request, State, Tokens, starting_state
from unmask.sampling.settings import SamplerSettings

# Logits computed at a time on a CPU (64 MiB in fp32); four times as many elsewhere.
_LOGITS_AT_ONCE = 2**24
# A CPU multiplies multiples of this many rows fastest.
_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class StepEvent:
    """What one network call committed, for the rows that took part in it. Tensors are on the CPU and never change.

    Rows join and leave from one event to the next.

    Attributes:
        rows: index of the request of each of the tensors' rows.
        lengths: answer columns of each row; columns behind are padding.
        block_B: int64 (B,), the block each row is in, from 0.
        end_B: int64 (B,), end of that block, exclusive; later positions are untouched.
        step_B: int64 (B,), the call's number within that block, from 0.
        nfe_B: int64 (B,), network calls each row has taken part in, this one included.
        answer_BC: int64 (B, C), the answers so far. At masked positions: the mask, or the current block's noisy tokens.
        masked_BC: bool (B, C), positions not committed yet. Do not infer it from ids: a given token may be a mask.
        committed_BC: bool (B, C), positions committed by this call.
        revised_BC: bool (B, C), positions whose token this call took back (masked again, drawn anew) or replaced.
        score_BC: float32 (B, C), the score of each masked position of the current block (the rule's: a probability, a
            random number, minus an entropy, …), otherwise -inf.
        confidence_BC: float32 (B, C), at these positions the probability of the sample (of a canvas: of its most likely
            token, at the call's temperature), and at edited positions that of the new token; otherwise 0.
        finished_B: bool (B,), rows that leave: nothing is masked, or nothing up to a stop token is.

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
    end_B: Tensor
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
    backend: Backend, settings: SamplerSettings, stop_ids: Sequence[int] = (), banned_ids: Sequence[int] = ()
) -> Tokens:
    """Sort a model's and a tokenizer's special tokens by what the settings say of them."""
    spec = backend.spec
    stop = tuple(sorted({*spec.eos_ids, *stop_ids}))
    # Families that pad with an end-of-text token mean the padding to be written, as the end of the text.
    banned = {token for token in spec.banned_ids if token not in stop or token == spec.mask_id}
    if settings.eos == "suppress":
        banned |= set(spec.eos_ids)
    deferred = stop if settings.eos == "defer" else ()
    return Tokens(stop, tuple(sorted(banned | set(banned_ids))), deferred, spec.mask_id, spec.vocab_size)


def denoise(
    backend: Backend,
    requests: Iterable[Request],
    settings: SamplerSettings,
    stop_ids: Sequence[int] = (),
    draws: Draws | None = None,
    batch_size: int | None = None,
    banned_ids: Sequence[int] = (),
    untempered: bool = False,
    labels: Sequence[str] | None = None,
) -> Iterator[StepEvent]:
    """Sample an answer to every request; yield an event after each network call.

    A row advances through its blocks at its own pace, and when it is finished the next request takes its place. So its
    answer and its number of calls are those that it would have alone.

    Args:
        backend: calls the model.
        requests: consumed as rows leave; prompt and answer of each must fit the model.
        settings: those the backend was made with.
        stop_ids: tokens that end an answer beside the model's own end-of-text tokens.
        draws: source of random numbers; None = one keyed by each request.
        batch_size: most rows denoised together; None = all.
        banned_ids: tokens that are never written, beside the model's own.
        untempered: report a canvas's confidence at temperature 1, so that calls can be compared.
        labels: what messages call each request; None = `prompt INDEX`.

    Raises:
        SamplingError: logits that are not finite; names the block, the step and the requests.
    """
    tokens = special_tokens(backend, settings, stop_ids, banned_ids)
    draws = KeyedDraws() if draws is None else draws
    process = PROCESSES[settings.noise](settings, tokens, draws, untempered, backend.self_conditioning)
    rule, reviser = RULES[settings.rule], REVISERS[settings.revise]
    queue, state = iter(requests), None
    context: Any = None
    while True:
        rows = 0 if state is None else len(state.rows)
        if more := list(islice(queue, None if batch_size is None else batch_size - rows)):
            joining = starting_state(more, settings, tokens.mask)
            prompts = backend.prefill([request.prompt_ids for request in more])
            state = state.concat(joining) if state is not None and rows else joining
            context = prompts if context is None else context.concat(prompts)
        if state is None or not state.rows:
            return

        before = process.begin(state)
        scored_BC = before.active_BC | before.revisable_BC if reviser.rereads else before.active_BC
        hidden_MD, positions, context = backend.denoise(context, _call(before, scored_BC))
        predictions = _predict(backend, process, hidden_MD, positions)
        if predictions.conditioning_MD is not None:
            context = context.conditioned(predictions.conditioning_MD)
        proposal = _proposal(predictions, before, scored_BC, labels)

        accept_BC = rule(proposal.score_BC, before.active_BC, process.quota(before), settings)
        revision = reviser.apply(before, accept_BC, proposal, settings, process.noise)
        completed_B = ~(revision.state.masked_BC & before.within_BC).any(dim=1)
        step_B = torch.where(completed_B, 0, before.step_B + 1)
        state = replace(revision.state, nfe_B=before.nfe_B + 1, step_B=step_B)
        finished_B = _finished(state, revision.committed_BC, tokens.stop)
        yield _event(before, state, revision, proposal, finished_B)

        if settings.drops_after_stop:
            state = _drop_after_stop(state, before.end_B, tokens.stop)
        first_B, end_B = before.first_B, before.end_B
        if finished_B.any():
            stays_B = ~finished_B
            state, context = state.select(stays_B), context.select(stays_B)
            first_B, end_B, completed_B = first_B[stays_B], end_B[stays_B], completed_B[stays_B]
        if completed_B.any():
            # Given tokens up to the next block with a masked position are final too.
            end_B = torch.where(completed_B, state.first_B, end_B)
            context = backend.commit(context, state.answer_BC, first_B, end_B, completed_B)


def _call(state: State, scored_BC: Tensor) -> Call:
    lengths, rows_M = tuple(state.length_B.tolist()), scored_BC.nonzero()[:, 0]
    positions = state.positions(scored_BC)
    return Call(state.answer_BC, lengths, state.first_B, state.end_B, state.step_B, rows_M, positions)


@torch.no_grad()
def _predict(backend: Backend, process: Process, hidden_MD: Tensor, positions: Positions) -> Predictions:
    """Return the predictions at the scored positions, computed in parts that fit into memory."""
    size = max(1, _LOGITS_AT_ONCE * (1 if backend.device.type == "cpu" else 4) // backend.spec.rows)
    size = size // _ROW_MULTIPLE * _ROW_MULTIPLE or size
    parts = [slice(start, start + size) for start in range(0, len(hidden_MD), size)]
    return Predictions.concat([process.predict(backend.logits(hidden_MD[part]), positions[part]) for part in parts])


def _proposal(predictions: Predictions, state: State, scored_BC: Tensor, labels: Sequence[str] | None) -> Proposal:
    """Scatter predictions into (B, C) tensors on the CPU; raises SamplingError where logits are not finite."""
    at = scored_BC.nonzero(as_tuple=True)
    predictions = predictions.to_host()
    if not predictions.finite_M.all():
        rows = at[0][~predictions.finite_M].unique().tolist()
        names = [f"prompt {index}" if labels is None else labels[index] for index in state.rows]
        where = [
            f"{names[row]} (block {int(state.block_B[row]) + 1}, step {int(state.step_B[row]) + 1})" for row in rows
        ]
        raise SamplingError(  # several requests may have one label
            f"logits are not finite at {', '.join(dict.fromkeys(where))}; check the checkpoint for nan or inf, or load "
            "it with dtype float32"
        )
    zero_BC, active_BC = torch.zeros(scored_BC.shape), state.active_BC
    return Proposal(
        state.answer_BC.index_put(at, predictions.sample_M),
        state.answer_BC.index_put(at, predictions.argmax_M),
        zero_BC.index_put(at, predictions.score_M).masked_fill(~active_BC, -torch.inf),
        zero_BC.index_put(at, predictions.confidence_M).masked_fill(~active_BC, 0),
        zero_BC.index_put(at, predictions.current_M),
        zero_BC.index_put(at, predictions.highest_M),
    )


def _finished(state: State, committed_BC: Tensor, stop: Sequence[int]) -> Tensor:
    """Return bool (B,): nothing is masked, nothing up to a stop token is, or a committed token misses its target."""
    masked_so_far_BC = state.masked_BC.long().cumsum(dim=1) > 0  # the position itself included
    targeted_BC = state.target_BC >= 0
    stopped_BC = _stops(state, stop) & ~masked_so_far_BC & ~targeted_BC
    missed_BC = committed_BC & targeted_BC & (state.answer_BC != state.target_BC)
    return ~state.masked_BC.any(dim=1) | (stopped_BC | missed_BC).any(dim=1)


def _stops(state: State, stop: Sequence[int]) -> Tensor:
    """Return bool (B, C): stop tokens that the sampler committed; given ones are text."""
    is_stop_BC = torch.isin(state.answer_BC, torch.tensor(stop, dtype=torch.long))
    return is_stop_BC & ~state.masked_BC & ~state.given_BC


def _drop_after_stop(state: State, end_B: Tensor, stop: Sequence[int]) -> State:
    """Return the state without the columns behind the current block in rows that have committed a stop token."""
    ends_B = _stops(state, stop).any(dim=1)
    return replace(state, length_B=torch.where(ends_B, torch.minimum(state.length_B, end_B), state.length_B))


def _event(before: State, state: State, revision: Revision, proposal: Proposal, finished_B: Tensor) -> StepEvent:
    edited_BC = revision.revised_BC & ~state.masked_BC
    confidence_BC = torch.where(edited_BC, proposal.highest_BC, proposal.confidence_BC)
    width = int(state.shown_B.max())  # a last canvas may be longer than the answer
    return StepEvent(
        rows=state.rows,
        lengths=tuple(state.shown_B.tolist()),
        block_B=before.block_B,
        end_B=torch.minimum(before.end_B, state.shown_B),
        step_B=before.step_B,
        nfe_B=state.nfe_B,
        answer_BC=state.answer_BC[:, :width],
        masked_BC=state.masked_BC[:, :width],
        committed_BC=revision.committed_BC[:, :width],
        revised_BC=revision.revised_BC[:, :width],
        score_BC=proposal.score_BC[:, :width],
        confidence_BC=confidence_BC[:, :width],
        finished_B=finished_B,
    )
