"""Two scores of an answer under a canvas model (DiffusionGemma), neither of them a bound on its log-likelihood.

The denoising cross-entropy is the decoder's training loss, over every canvas and many noise levels. Uniform noise with
an unweighted loss has no known bound on log p behind it, so none is claimed; it compares two models on the same
answers. The autoregressive log-likelihood is exact, of the encoder: the same weights read from left to right, which is
not how the decoder writes.

Shapes: A answer tokens, C positions of a canvas, K canvases of a batch, S samples, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask import rng
from unmask.errors import SamplingError
from unmask.evaluation.likelihood import DEFAULT_BATCH_SIZE, content_key, method_for, standard_error
from unmask.ops.linear_cross_entropy import cross_entropies

DEFAULT_LEVELS = 32


@dataclass(frozen=True)
class DenoisingCrossEntropy:
    """Mean cross-entropy of an answer's A tokens, replaced or not, over uniform noise of several levels.

    `value` and its `standard_error` (nan for one level) are in nats a token.
    """

    value: float
    standard_error: float
    num_samples: int
    tokens: int

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class ARLogLikelihood:
    """Log-likelihood of an answer's A tokens read from left to right by the encoder, in nats, summed, at most 0.

    `greedy` says whether each token is the most probable one at its position.
    """

    value: float
    tokens: int
    greedy: bool

    @property
    def perplexity(self) -> float:
        """exp(−value / tokens)."""
        return math.exp(-self.value / self.tokens)

    def __float__(self) -> float:
        return self.value


@torch.no_grad()
def denoising_cross_entropy(
    model: Any,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    num_samples: int = DEFAULT_LEVELS,
    seed: int = 42,
    *,
    batch_size: int | None = None,
) -> DenoisingCrossEntropy:
    """Corrupt each canvas of an answer at levels spread evenly over (0, 1) and predict its clean tokens.

    As in training: a token is replaced with probability t by a uniform draw from the vocabulary, a canvas sees the
    clean tokens before it through the encoder, and the last one is filled up with the end-of-text token, which is
    corrupted like the rest. Unlike there, the fill is not scored, every canvas is, and there is no self-conditioning.
    Noise is a function of (seed, prompt and answer, canvas, sample).

    Arguments and errors as in `log_likelihood`, for a model with uniform noise and canvas attention; but the prompt has
    at least one token, `num_samples` counts noise levels, and `batch_size` the canvases that the decoder sees at once.
    """
    prompt, answer = _checked(model, "denoising_cross_entropy", prompt_ids, answer_ids)
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if num_samples < 1 or size < 1:
        raise SamplingError(f"num_samples and batch_size: must be at least 1, got {num_samples} and {size}")
    config, device = model.config, next(model.parameters()).device
    length = config.canvas_length
    canvases = -(-len(answer) // length)
    filled = torch.tensor(answer + [config.eos_token_id] * (canvases * length - len(answer))).view(canvases, length)
    scored = (torch.arange(canvases * length) < len(answer)).view(canvases, length)
    encoded = model.encode(torch.tensor([prompt + answer], device=device))
    name = f"denoising/{content_key(prompt, answer)}"
    sums_S = np.zeros(num_samples)
    work = [(canvas, sample) for canvas in range(canvases) for sample in range(num_samples)]
    for start in range(0, len(work), size):
        part = work[start : start + size]
        noisy_KC = torch.stack([_noisy(filled[c], c, s, num_samples, config.vocab_size, seed, name) for c, s in part])
        starts = [len(prompt) + canvas * length for canvas, _ in part]
        rows_K = torch.zeros(len(part), dtype=torch.int64, device=device)
        hidden_KCD = model.decode(noisy_KC.to(device), encoded, rows=rows_K, starts=starts)
        numbers = [canvas for canvas, _ in part]
        scored_KC, targets_KC = scored[numbers], filled[numbers]
        losses_N = _losses(model, hidden_KCD.flatten(0, 1), scored_KC.flatten(), targets_KC.flatten())
        rows_N = scored_KC.nonzero()[:, 0].tolist()
        np.add.at(sums_S, [part[row][1] for row in rows_N], losses_N.numpy())
    values_S = sums_S / len(answer)
    return DenoisingCrossEntropy(float(values_S.mean()), standard_error(values_S), num_samples, len(answer))


@torch.no_grad()
def ar_log_likelihood(model: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> ARLogLikelihood:
    """Return Σ log p(token | tokens before it) over an answer, from the encoder, exactly.

    Arguments and errors as in `denoising_cross_entropy`.
    """
    prompt, answer = _checked(model, "ar_log_likelihood", prompt_ids, answer_ids)
    device = next(model.parameters()).device
    hidden_ND = model.encode(torch.tensor([prompt + answer], device=device)).hidden_BLD[0, len(prompt) - 1 : -1]
    scored_N = torch.ones(len(answer), dtype=torch.bool)
    targets_N = torch.tensor(answer)
    value = -float(_losses(model, hidden_ND, scored_N, targets_N).sum())
    chunks = [model.logits(part_ND).argmax(dim=-1).cpu() for part_ND in hidden_ND.split(64)]
    return ARLogLikelihood(value, len(answer), bool((torch.cat(chunks) == targets_N).all()))


def _noisy(clean_C: Tensor, canvas: int, sample: int, samples: int, vocab_size: int, seed: int, name: str) -> Tensor:
    draws = rng.generator(seed, f"{name}/{canvas}", 0, sample)
    level = (sample + draws.random()) / samples
    replaced_C = torch.from_numpy(draws.random(len(clean_C)) < level)
    return torch.where(replaced_C, torch.from_numpy(draws.integers(0, vocab_size, len(clean_C))), clean_C)


def _losses(model: Any, hidden_ND: Tensor, scored_N: Tensor, targets_N: Tensor) -> Tensor:
    """Return the cross-entropy of the scored positions on the CPU, float64, nats."""
    positions = scored_N.nonzero()[:, 0]
    scored_ND = hidden_ND[positions.to(hidden_ND.device)]
    losses_N = cross_entropies(scored_ND, model.head, targets_N[positions].to(hidden_ND.device))
    return losses_N.double().clamp(min=0).cpu()


def _checked(
    model: Any, what: str, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    method_for({("uniform", "canvas"): None}, model, what, "use unmask.log_likelihood for a mask")
    prompt, answer = [int(token) for token in prompt_ids], [int(token) for token in answer_ids]
    if not prompt or not answer:
        raise SamplingError(f"{what}: the {'answer' if prompt else 'prompt'} is empty; give at least one token")
    return prompt, answer
