"""What a denoising step decides, as pure functions: which token each open position would get, how sure that is, and
which positions take it. A new score or rule is one function and one line in its table.

Shapes: M open positions, V vocabulary rows, B rows, C positions of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.sampling.settings import CanvasSettings, MaskSettings, Settings


def ban(logits_MV: Tensor, token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """Return the logits with -inf for `token_ids` and for the padded rows from `vocab_size` on."""
    logits_MV = logits_MV.clone()
    logits_MV[:, vocab_size:] = -torch.inf
    for token in token_ids:
        logits_MV[:, token : token + 1] = -torch.inf  # a slice, so an id that the head has no row for is no error
    return logits_MV


def choose(logits_MV: Tensor, temperature: float, gumbel_MV: Tensor | None) -> Tensor:
    """Return the candidate token of each position, int64 (M,): argmax(logits + T·Gumbel) in float64.

    That is one sample of softmax(logits / T) (Gumbel-max trick). In lower precision the noise's tail is cut and the
    samples are too likely (Zheng et al. 2024, arXiv 2409.02908), hence float64.

    Args:
        logits_MV: (M, V), banned tokens at -inf.
        temperature: T; 0 takes the argmax of the logits.
        gumbel_MV: float64 (M, V) of standard Gumbel noise; None at temperature 0.
    """
    if gumbel_MV is None:
        return logits_MV.max(dim=-1).indices
    return (logits_MV + temperature * gumbel_MV).max(dim=-1).indices


def confidence(logits_MV: Tensor, tokens_M: Tensor, uniform_M: Tensor | None) -> Tensor:
    """Return softmax(logits)[token], float32 (M,), without temperature; `uniform_M` is not used.

    In fp32 whatever the model computes in: bf16 probabilities have so few values that most positions would tie.
    """
    logits_MV = logits_MV.float()
    return (logits_MV.gather(-1, tokens_M[:, None])[:, 0] - logits_MV.logsumexp(dim=-1)).exp()


def random_order(logits_MV: Tensor, tokens_M: Tensor, uniform_M: Tensor | None) -> Tensor:
    """Return a uniform random number a position, float32 (M,), whatever the logits say."""
    assert uniform_M is not None
    return uniform_M.float()


@dataclass(frozen=True)
class Score:
    """How urgently a position is settled.

    Attributes:
        measure: (logits_MV, tokens_M, uniform_M or None) -> (M,), larger first.
        random: whether it needs a uniform number a position.
    """

    measure: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    random: bool = False


def ranks(scores_BC: Tensor, active_BC: Tensor) -> Tensor:
    """Return each active position's place by falling score, 0 for the best, int64 (B, C); inactive ones come last.

    Ties go to the lower position; a score of -inf still comes before every inactive position.
    """
    by_score_BC = scores_BC.argsort(dim=-1, descending=True, stable=True)
    inactive_first = (~active_BC).gather(-1, by_score_BC).long().argsort(dim=-1, stable=True)
    return by_score_BC.gather(-1, inactive_first).argsort(dim=-1)


def settle_quota(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: Settings) -> Tensor:
    """Settle the `quota_B` best active positions of each row (LLaDA, generate.py); bool (B, C)."""
    return active_BC & (ranks(scores_BC, active_BC) < quota_B[:, None])


def settle_threshold(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: Settings) -> Tensor:
    """Settle every active position with a score of at least `settings.threshold`, and always the best one; bool (B, C).

    Source: Fast-dLLM (arXiv 2505.22618), section 3.3. The quota is not used.
    """
    assert isinstance(settings, MaskSettings) and settings.threshold is not None
    return active_BC & ((scores_BC >= settings.threshold) | (ranks(scores_BC, active_BC) < 1))


def accept_by_entropy(scores_BC: Tensor, active_BC: Tensor, quota_B: Tensor, settings: Settings) -> Tensor:
    """Accept active positions by rising entropy while those before have at most `entropy_bound` together; bool (B, C).

    The entropies before a position bound the mutual information of taking it along with them, so what is accepted is
    nearly independent. The most certain position is always accepted. The quota is not used.

    Source: arXiv 2505.24857; transformers, generation_diffusion_gemma.py, `accept_canvas`.

    Args:
        scores_BC: minus the entropy of each active position, in nats.
    """
    assert isinstance(settings, CanvasSettings)
    entropy_BC = (-scores_BC).double().masked_fill(~active_BC, torch.inf)
    rising_BC, order_BC = entropy_BC.sort(dim=-1, stable=True)
    before_BC = rising_BC.cumsum(dim=-1) - rising_BC  # inf - inf at inactive positions is nan, which passes no bound
    accepted_BC = torch.zeros_like(active_BC).scatter(1, order_BC, before_BC <= settings.entropy_bound)
    return active_BC & accepted_BC


SCORES: dict[str, Score] = {
    "low_confidence": Score(confidence),
    "random": Score(random_order, random=True),
}

RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Settings], Tensor]] = {
    "quota": settle_quota,
    "threshold": settle_threshold,
    "entropy_bound": accept_by_entropy,
}
