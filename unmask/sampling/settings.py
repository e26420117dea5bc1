"""How an answer is sampled: the settings of the denoising loop and the schedule that follows from them.

No torch here, so a bad setting is refused before anything heavy loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from unmask.errors import SamplingError
from unmask.sections import choice_problem

Remasking = Literal["low_confidence", "random"]
Eos = Literal["allow", "suppress", "defer"]


@dataclass(frozen=True)
class SamplerConfig:
    """LLaDA's sampler (Nie et al. 2025, appendix A.3; ML-GSAI/LLaDA, generate.py). Defaults are the published ones.

    Attributes:
        steps: network calls for the whole answer, at least 1; shared out over the blocks, at least one each. Not used
            with `threshold`.
        max_new_tokens: length of the answer, at least 1.
        block_size: the answer is denoised in blocks of this length from left to right; the last may be shorter.
        temperature: 0 takes the most likely token; T > 0 samples from softmax(logits / T).
        remasking: which open positions are settled first: `low_confidence` those with the most probable token (the
            others stay masked), `random` any. With `threshold` it must be `low_confidence`: random scores are no
            confidence to compare.
        threshold: settle every open position of the block whose score is at least this, and always one; None settles a
            fixed number a step. Above 1 it is one token a step, 0 one step a block.
        cfg_scale: s of classifier-free guidance, u + (s + 1)(c - u), where u has the prompt masked; 0 is off.
        eos: `allow`; `suppress` never writes the model's end-of-text token; `defer` settles stop tokens last.

    Raises:
        SamplingError: a value outside its range, or two that exclude each other; the message names it.
    """

    steps: int = 128
    max_new_tokens: int = 128
    block_size: int = 32
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    eos: Eos = "allow"

    def __post_init__(self) -> None:
        for name in ("steps", "max_new_tokens", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SamplingError(f"{name}: must be an integer of at least 1, got {value!r}")
        for name in ("temperature", "cfg_scale", "threshold"):
            value = getattr(self, name)
            if name == "threshold" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SamplingError(f"{name}: must be a number of at least 0, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise SamplingError(f"{name}: must be a finite number of at least 0, got {value!r}")
        for name, choices in (("remasking", get_args(Remasking)), ("eos", get_args(Eos))):
            if getattr(self, name) not in choices:
                raise SamplingError(f"{name}: {choice_problem(getattr(self, name), choices)}")
        if self.remasking == "random" and self.threshold is not None:
            raise SamplingError(
                f"remasking: random scores cannot be compared with threshold {self.threshold}; use low_confidence, or "
                "leave threshold out"
            )

    @property
    def rule(self) -> str:
        """Name of the selection rule that these settings ask for, a key of `rules.RULES`."""
        return "quota" if self.threshold is None else "threshold"


def block_sizes(max_new_tokens: int, block_size: int) -> tuple[int, ...]:
    """Return the lengths of the blocks from left to right; all `block_size` but the last, which has the rest."""
    whole, rest = divmod(max_new_tokens, block_size)
    return (block_size,) * whole + ((rest,) if rest else ())


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` integers that differ by at most one, the larger ones first."""
    each, more = divmod(total, parts)
    return (each + 1,) * more + (each,) * (parts - more)


def block_quotas(sampler: SamplerConfig) -> tuple[tuple[int, ...], ...]:
    """Return, for each block, how many tokens each of its network calls settles; the numbers add up to its length.

    A block has steps // blocks steps, the first ones one more until all are given out, and at least one. A step that
    would settle nothing (more steps than positions) is left out, because its network call could not change anything.
    """
    sizes = block_sizes(sampler.max_new_tokens, sampler.block_size)
    steps = shares(sampler.steps, len(sizes))
    return tuple(
        tuple(quota for quota in shares(size, max(1, count)) if quota) for size, count in zip(sizes, steps, strict=True)
    )
