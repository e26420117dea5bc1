"""What a denoising call decides, as pure functions in three tables.

`SCORES` says how urgently each masked position takes its token, `RULES` which positions take it, `REVISERS` which
tokens are masked again or written over.

A new score, rule or way to revise is one function and one line in its table. Every way to revise ends: in each call of
a block at least one position more is committed than is masked again, so a block of n masked positions takes at most n
calls; a canvas takes at most `steps`.

Shapes: M positions, V vocabulary rows, B rows, C columns of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.ops.categorical import BLOCK
from unmask.sampling.engine.state import State
from unmask.sampling.settings import SamplerSettings

# (state, where_BC) → int64 (B, C), what stands at masked positions before the next call: masks, or random tokens.
Noise = Callable[[State, Tensor], Tensor]


def ban_(logits_MV: Tensor, token_ids: Sequence[int], vocab_size: int, value: float = -torch.inf) -> Tensor:
    """Put `value`, in place, for `token_ids` and for the padded rows from `vocab_size` on; return the logits."""
    logits_MV[:, vocab_size:] = value
    for token in token_ids:
        logits_MV[:, token : token + 1] = value  # a slice, so an id that the head has no row for is no error
    return logits_MV


def sample(logits_MV: Tensor, temperature: float, gumbel_MV: Tensor | None) -> Tensor:
    """Return one sample of softmax(logits / T) a position, int64 (M,): argmax(logits + T·Gumbel) in float64.

    In lower precision the noise's tail is cut and probable tokens are drawn too often (Zheng et al. 2024,
    arXiv 2409.02908). Without Gumbel noise, float64 (M, V), it is the argmax.
    """
    return argmax(logits_MV if gumbel_MV is None else logits_MV + temperature * gumbel_MV)


def argmax(logits_MV: Tensor) -> Tensor:
    """Return the column of each row's highest value, the first one where several are, int64 (M,).

    Over a whole vocabulary a CPU's argmax takes ten times as long as its maximum. So it finds the block of columns that
    has the maximum first, and then the column in it.
    """
    whole = logits_MV.shape[1] // BLOCK * BLOCK
    if not logits_MV.device.type == "cpu" or not whole:
        return logits_MV.max(dim=-1).indices
    blocks_MJK = logits_MV[:, :whole].unflatten(1, (-1, BLOCK))
    highest_M, block_M = blocks_MJK.amax(dim=-1).max(dim=-1)
    inside_MK = blocks_MJK[torch.arange(len(block_M)), block_M]
    column_M = block_M * BLOCK + inside_MK.max(dim=-1).indices
    if whole == logits_MV.shape[1]:
        return column_M
    rest_M, rest_column_M = logits_MV[:, whole:].max(dim=-1)
    return torch.where(rest_M > highest_M, whole + rest_column_M, column_M)


def logit(logits_MV: Tensor, tokens_M: Tensor) -> Tensor:
    """Return each position's logit of its token, (M,)."""
    return logits_MV.gather(-1, tokens_M[:, None])[:, 0]


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may go by, of M positions, on their device; in fp32: most bf16 probabilities would tie."""

    logits_MV: Tensor  # without temperature, banned tokens at -inf
    total_M: Tensor  # their logsumexp
    confidence_M: Tensor  # softmax(logits)[sample]
    column_M: Tensor  # int64, in the answer
    uniform_M: Tensor | None  # a uniform number a position; None where the score does not ask for one


def low_confidence(inputs: ScoreInputs) -> Tensor:
    """Return the probability of the sample (LLaDA's name, from the other end: the least confident stay masked)."""
    return inputs.confidence_M


def negative_entropy(inputs: ScoreInputs) -> Tensor:
    """Return Σ p log p in nats, at most 0; that of a sure position is 0 (Dream, arXiv 2508.15487)."""
    probabilities_MV = (inputs.logits_MV - inputs.total_M[:, None]).exp_()
    return -torch.special.entr(probabilities_MV).sum(dim=-1)


def margin(inputs: ScoreInputs) -> Tensor:
    """Return p₁ − p₂, the two most probable tokens' difference, in [0, 1] (Kim et al. 2025, arXiv 2502.06768)."""
    best_M2 = inputs.logits_MV.topk(min(2, inputs.logits_MV.shape[1]), dim=-1).values
    best_M2 = (best_M2 - inputs.total_M[:, None]).exp_()
    return best_M2[:, 0] - best_M2[:, 1] if best_M2.shape[1] == 2 else best_M2[:, 0]


def random_order(inputs: ScoreInputs) -> Tensor:
    """Return a uniform random number a position, whatever the logits say."""
    assert inputs.uniform_M is not None
    return inputs.uniform_M


def left_to_right(inputs: ScoreInputs) -> Tensor:
    """Return minus the column, so that the leftmost comes first."""
    return -inputs.column_M


@dataclass(frozen=True)
class Score:
    """How urgently a position is committed: (M,), larger first; `random` ones need a uniform number a position."""

    measure: Callable[[ScoreInputs], Tensor]
    random: bool = False


def ranks(scores_BC: Tensor, active_BC: Tensor) -> Tensor:
    """Return each active position's place by falling score, 0 for the best, int64 (B, C); inactive ones come last.

    Ties go to the lower position; a score of -inf still comes before every inactive position.
    """
    lowest = torch.finfo(scores_BC.dtype).min
    order_BC = scores_BC.clamp(min=lowest).masked_fill(~active_BC, -torch.inf).argsort(descending=True, stable=True)
    return torch.empty_like(order_BC).scatter_(1, order_BC, torch.arange(order_BC.shape[1]).expand_as(order_BC))


def accept_quota(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: SamplerSettings) -> Tensor:
    """Accept the `quota_B` best active positions of each row (LLaDA, generate.py); bool (B, C)."""
    return active_BC & (ranks(scores_BC, active_BC) < quota_B[:, None])


def accept_threshold(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: SamplerSettings) -> Tensor:
    """Accept every active position that scores at least `settings.threshold`, and always the best one; bool (B, C).

    Source: Fast-dLLM (arXiv 2505.22618), section 3.3.
    """
    assert settings.threshold is not None
    return active_BC & ((scores_BC >= settings.threshold) | (ranks(scores_BC, active_BC) < 1))


def accept_factor(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: SamplerSettings) -> Tensor:
    """Accept the longest run of best positions of which the r-th, from 1, scores at least 1 − f/(r + 1); bool (B, C).

    The more are committed together, the surer each must be; f is `settings.factor`. Always the best one.
    Source: Fast-dLLM (arXiv 2505.22618), section 3.3, factor-based decoding.
    """
    assert settings.factor is not None
    falling_BC = scores_BC.double().masked_fill(~active_BC, -torch.inf).sort(dim=-1, descending=True).values
    needed_C = 1 - settings.factor / torch.arange(2, falling_BC.shape[1] + 2, dtype=torch.float64)
    run_B = (falling_BC >= needed_C).long().cumprod(dim=-1).sum(dim=-1).clamp(min=1)
    return active_BC & (ranks(scores_BC, active_BC) < run_B[:, None])


def accept_entropy_bound(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: SamplerSettings) -> Tensor:
    """Accept active positions by rising entropy while those before have at most `entropy_bound` together; bool (B, C).

    A score is minus an entropy, in nats; -inf at positions to be accepted last. The entropies before a position bound
    the mutual information of taking it along with them, so what is accepted is nearly independent. The most certain
    position is always accepted. Source: arXiv 2505.24857; transformers, generation_diffusion_gemma.py, `accept_canvas`.
    """
    assert settings.entropy_bound is not None
    entropy_BC = (-scores_BC).double().masked_fill(~active_BC, torch.inf)
    rising_BC, order_BC = entropy_BC.sort(dim=-1, stable=True)
    before_BC = rising_BC.cumsum(dim=-1) - rising_BC  # inf - inf is nan, which passes no bound
    accepted_BC = torch.zeros_like(active_BC).scatter(1, order_BC, before_BC <= settings.entropy_bound)
    return active_BC & (accepted_BC | (ranks(scores_BC, active_BC) < 1))


SCORES: dict[str, Score] = {
    "low_confidence": Score(low_confidence),
    "entropy": Score(negative_entropy),
    "margin": Score(margin),
    "random": Score(random_order, random=True),
    "left_to_right": Score(left_to_right),
}

# (scores_BC, active_BC, quota_B, settings) → bool (B, C); only the first goes by the quota.
RULES: dict[str, Callable[[Tensor, Tensor, Tensor, SamplerSettings], Tensor]] = {
    "quota": accept_quota,
    "threshold": accept_threshold,
    "factor": accept_factor,
    "entropy_bound": accept_entropy_bound,
}


@dataclass(frozen=True)
class Proposal:
    """The `noise.Predictions` of a call in their places, (B, C) on the CPU.

    Elsewhere stand the current tokens, a score of -inf and probabilities of 0; so do score and confidence of committed
    positions.
    """

    sample_BC: Tensor
    argmax_BC: Tensor
    score_BC: Tensor
    confidence_BC: Tensor
    current_BC: Tensor
    highest_BC: Tensor


@dataclass(frozen=True)
class Revision:
    """The outcome of a call: the next answer and what of it is masked; committed and revised as in `StepEvent`."""

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
    commits in the same call, so it never needs more calls than one token a call would. A committed token is judged
    while the network sees it, where WINO (arXiv 2507.18578) judges it from a masked copy of the block beside it.
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
    """A way to revise; one that `rereads` asks for predictions of the current block's committed tokens as well."""

    apply: Callable[[State, Tensor, Proposal, SamplerSettings, Noise], Revision]
    rereads: bool = False


REVISERS: dict[str, Reviser] = {
    "none": Reviser(commit),
    "remask": Reviser(remask, rereads=True),
    "edit": Reviser(edit, rereads=True),
    "redraw": Reviser(redraw),
}
