"""Log-likelihood of an answer under a masked diffusion model: a Monte Carlo estimate of its bound.

For an answer of A tokens the bound is

    log p(y | x) ≥ − E_k E_M [ A/k · Σ_{i in M} CE_i(M) ],   k ~ U{1..A},  M ~ U{subsets of k tokens},

CE_i(M) the cross-entropy of token i where the tokens of M are masked and all others are seen (Nie et al. 2025,
arXiv 2502.09992, appendix B.5; Ou et al. 2024, arXiv 2406.03736). Masking exactly k tokens instead of each with a
probability leaves the expectation as it is and removes the variance of their number. No token is banned.

Shapes: S samples, A answer tokens, U different masks, B rows, L positions, N masked positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch

from unmask import rng
from unmask.errors import ModelError, SamplingError
from unmask.models.registry import family_of
from unmask.ops.linear_cross_entropy import cross_entropies
from unmask.ops.padding import padded

DEFAULT_SAMPLES = 128
# Rows of the network's batch unless the caller says otherwise.
DEFAULT_BATCH_SIZE = 16

Method = TypeVar("Method")
Pair = tuple[Sequence[int], Sequence[int]]  # ids of a prompt and of its answer


@dataclass(frozen=True)
class LogLikelihood:
    """An estimate of the bound on log p(answer | prompt)."""

    value: float  # nats, summed over the answer's tokens, at most 0
    standard_error: float  # Monte Carlo error, nats; 0 for an exact sum, nan for one sample of several masks
    num_samples: int  # masks that the value rests on, not counting the full one of antithetic samples

    def __float__(self) -> float:
        return self.value


def log_likelihood(
    model: Any,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    num_samples: int = DEFAULT_SAMPLES,
    seed: int = 42,
    *,
    batch_size: int | None = None,
    antithetic: bool = False,
    exact_if_cheaper: bool = False,
) -> LogLikelihood:
    """Estimate the bound on log p(answer | prompt) of a masked diffusion model.

    The numbers k of masked tokens are stratified: 1..A is cut into as many equal parts as there are samples, and each
    sample draws its k from its own part. LLaDA's get_log_likelihood.py spreads them from one random start instead,
    which moves them all together: with fewer samples than tokens its estimates vary by more than any one of them shows.
    Masks are a function of (seed, prompt and answer, sample). An answer of one token has one mask, so it is exact.

    With `antithetic`, samples come in pairs: a mask of k < A tokens and its complement of A − k, each weighted by A
    over its own number; the pairs are stratified over min(k, A − k). The full mask has no complement: it is computed
    once and counts 1/A. k uniform on 1..A − 1 makes A − k so too, hence the estimate is unbiased; a token that is hard
    to predict is in exactly one mask of a pair, so errors cancel and the pair's variance is below that of two
    independent samples.

    Args:
        model: from `unmask.load_model`, with mask noise and bidirectional attention.
        prompt_ids: tokens before the answer; may be empty.
        answer_ids: the A tokens that are scored, at least one; end-of-text counts only where it is given.
        num_samples: masks, at least 1; even with `antithetic`, where the full mask comes on top. Equal masks are
            computed once.
        seed: of the masks.
        batch_size: rows that the network sees at once; None = 16.
        antithetic: draw complementary pairs.
        exact_if_cheaper: where an answer has no more than `num_samples` masks, 2^A − 1, sum over all of them: the bound
            itself, with a standard error of 0.

    Raises:
        SamplingError: an empty answer, or a number out of range.
        ModelError: a model of other noise or attention, or an input that is too long for it.
    """
    options = {"batch_size": batch_size, "antithetic": antithetic, "exact_if_cheaper": exact_if_cheaper}
    return log_likelihoods(model, [(prompt_ids, answer_ids)], num_samples, seed, **options)[0]


def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    num_samples: int = DEFAULT_SAMPLES,
    seed: int = 42,
    *,
    batch_size: int | None = None,
    antithetic: bool = False,
    exact_if_cheaper: bool = False,
) -> list[LogLikelihood]:
    """As `log_likelihood`, for several pairs of a prompt and an answer, whose rows share the network's batches."""
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    _check_numbers(num_samples, size, antithetic)
    pairs = [(_ids(prompt), _ids(answer)) for prompt, answer in pairs]
    mask_id = _mask_of(model)
    plans = [_plan(index, *pair, num_samples, seed, antithetic, exact_if_cheaper) for index, pair in enumerate(pairs)]
    sums = [np.zeros(len(plan.masks_UA)) for plan in plans]
    for batch in _batches(pairs, plans, size):
        for (index, mask), total in zip(batch, _masked_sums(model, pairs, plans, batch, mask_id), strict=True):
            sums[index][mask] = total
    return [plan.estimate(found_U) for plan, found_U in zip(plans, sums, strict=True)]


def method_for(methods: Mapping[tuple[str, str], Method], model: Any, what: str, otherwise: str) -> Method:
    """Return the entry of a table by (noise, attention) for a model.

    Raises:
        ModelError: no known family, or no such entry; the message says `what` asks, and what to do `otherwise`.
    """
    if not hasattr(getattr(model, "config", None), "family"):
        raise ModelError(f"{what}: {type(model).__name__} is of no known family; load it with unmask.load_model")
    family = family_of(model.config)
    if (family.noise, family.attention) not in methods:
        known = " or ".join(f"{noise} noise and {attention} attention" for noise, attention in methods)
        raise ModelError(
            f"{what}: it needs {known}, and {family.name} has {family.noise} noise and {family.attention} attention; "
            f"{otherwise}"
        )
    return methods[family.noise, family.attention]


def _mask_of(model: Any) -> int:
    otherwise = "use unmask.denoising_cross_entropy or unmask.ar_log_likelihood for a canvas"
    method_for({("mask", "bidirectional"): None}, model, "log_likelihood", otherwise)
    return int(model.config.mask_token_id)


@dataclass(frozen=True)
class Plan:
    """The masks of one answer and how their sums become an estimate."""

    masks_UA: np.ndarray  # bool, the different masks, True = masked
    sample_S: np.ndarray | None  # the mask of each sample, in the order of the strata; None sums over all masks
    antithetic: bool  # samples 2j and 2j + 1 are a pair, and one more, the last, is the full mask

    def estimate(self, sums_U: np.ndarray) -> LogLikelihood:
        """Return the estimate from Σ_{i in M} CE_i(M) of each mask, nats."""
        answer = self.masks_UA.shape[1]
        counts_U = self.masks_UA.sum(axis=1)
        values_U = -sums_U * answer / counts_U
        if self.sample_S is None:
            chances_U = np.array([1 / (answer * math.comb(answer, count)) for count in counts_U.tolist()])
            return LogLikelihood(float(values_U @ chances_U), 0.0, len(values_U))
        values_S = values_U[self.sample_S]
        if not self.antithetic:
            return LogLikelihood(float(values_S.mean()), standard_error(values_S), len(values_S))
        pairs_P, share = values_S[:-1].reshape(-1, 2).mean(axis=1), 1 / answer
        value = share * float(values_S[-1]) + (1 - share) * float(pairs_P.mean())
        return LogLikelihood(value, (1 - share) * standard_error(pairs_P), len(values_S) - 1)


def standard_error(ordered_S: np.ndarray) -> float:
    """Return the standard error of the mean of independent samples, one a stratum in order, from their differences.

    Half the squared difference of two neighbours is, in the mean, the variance of both strata, and more where their
    means differ: it errs on the safe side (Wolter 2007, Introduction to Variance Estimation, ch. 8). The first and the
    last stratum are in one difference only, which counts half as much again. nan for fewer than two samples.
    """
    samples = len(ordered_S)
    if samples < 2:
        return math.nan
    squares = np.diff(ordered_S) ** 2
    total = (float(squares.sum()) + float(squares[0] + squares[-1]) / 2) / 2
    return math.sqrt(total) / samples


def stratified_counts(top: float, uniform_S: np.ndarray) -> np.ndarray:
    """Return a number of tokens from each of S equal parts of (0, top], int64 (S,): floor of a point in the part, + 1.

    `uniform_S` in [0, 1) says where in its part each point lies.
    """
    samples = len(uniform_S)
    points_S = (np.arange(samples) + uniform_S) * (top / samples)
    return np.minimum(points_S.astype(np.int64) + 1, math.ceil(top))


def content_key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """Return the name of the random stream from which the noise of a prompt and its answer is drawn."""
    text = f"{','.join(map(str, prompt_ids))}|{','.join(map(str, answer_ids))}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _plan(
    index: int, prompt: list[int], answer: list[int], samples: int, seed: int, antithetic: bool, exact: bool
) -> Plan:
    if not answer:
        raise SamplingError(f"log_likelihood: answer {index} is empty; give at least one token to score")
    length = len(answer)
    if length == 1 or (exact and length < 64 and 2**length - 1 <= samples):
        numbers_U = np.arange(1, 2**length)
        masks_UA = (numbers_U[:, None] >> np.arange(length)) & 1 == 1
        return Plan(masks_UA, None, antithetic)
    name = f"likelihood/{content_key(prompt, answer)}"
    drawn = samples // 2 if antithetic else samples
    draws = [rng.generator(seed, name, 0, sample) for sample in range(drawn)]
    # The smaller number of a pair, of which A/2 for an even A is half as likely as the others.
    top = (length - 1) / 2 if antithetic else length
    counts_S = stratified_counts(top, np.array([draw.random() for draw in draws]))
    masks_SA = np.zeros((drawn, length), dtype=bool)
    for sample, count in enumerate(counts_S.tolist()):
        masks_SA[sample, draws[sample].permutation(length)[:count]] = True
    if antithetic:
        masks_SA = np.stack((masks_SA, ~masks_SA), axis=1).reshape(-1, length)
        masks_SA = np.concatenate((masks_SA, np.ones((1, length), dtype=bool)))
    masks_UA, sample_S = np.unique(masks_SA, axis=0, return_inverse=True)
    return Plan(masks_UA, sample_S.reshape(-1), antithetic)


def _batches(pairs: Sequence[Pair], plans: Sequence[Plan], size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the rows of each batch as (pair, mask); rows of like length come together."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    rows = [(index, mask) for index in order for mask in range(len(plans[index].masks_UA))]
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def _masked_sums(
    model: Any, pairs: Sequence[Pair], plans: Sequence[Plan], batch: Sequence[tuple[int, int]], mask_id: int
) -> np.ndarray:
    """Return Σ CE over the masked tokens of each row, float64 (B,), nats; the head sees the masked positions alone."""
    device = next(model.parameters()).device
    ids_BL, attends_BL = padded([[*pairs[index][0], *pairs[index][1]] for index, _ in batch])
    masked_BL = torch.zeros_like(attends_BL)
    for row, (index, mask) in enumerate(batch):
        start, masked_A = len(pairs[index][0]), torch.from_numpy(plans[index].masks_UA[mask])
        masked_BL[row, start : start + len(masked_A)] = masked_A
    positions_N = masked_BL.flatten().nonzero()[:, 0]
    targets_N = ids_BL.flatten()[positions_N]
    noisy_BL = ids_BL.masked_fill(masked_BL, mask_id).to(device)
    hidden_BLD = model(noisy_BL, None if bool(attends_BL.all()) else attends_BL.to(device))
    masked_ND = hidden_BLD.flatten(0, 1)[positions_N.to(device)]
    losses_N = cross_entropies(masked_ND, model.head, targets_N.to(device)).double().clamp(min=0).cpu()
    sums_B = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, positions_N // ids_BL.shape[1], losses_N)
    return sums_B.numpy()


def _ids(ids: Sequence[int]) -> list[int]:
    return [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]  # pyright: ignore[reportAttributeAccessIssue]


def _check_numbers(samples: int, size: int, antithetic: bool) -> None:
    if samples < 1:
        raise SamplingError(f"num_samples: must be at least 1, got {samples}")
    if antithetic and samples % 2:
        raise SamplingError(f"num_samples: must be even with antithetic pairs, got {samples}")
    if size < 1:
        raise SamplingError(f"batch_size: must be at least 1, got {size}")
