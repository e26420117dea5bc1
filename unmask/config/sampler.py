"""What a caller may ask of the sampler. `unmask.sampling.settings` fills in what the model's family and files say."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from unmask.errors import SamplingError, choice_problem

Remasking = Literal["low_confidence", "entropy", "margin", "random", "left_to_right"]
Eos = Literal["allow", "suppress", "defer"]
Cache = Literal["none", "prefix", "dual", "block"]
Revise = Literal["none", "remask", "edit", "redraw"]
Preset = Literal["reference", "balanced", "fast"]

# Scores in [0, 1], which a threshold or factor can be compared with.
PROBABILITIES: tuple[Remasking, ...] = ("low_confidence", "margin")
# Setting that names a rule, of which each excludes the others → the scores that the rule can compare; () = any.
RULE_SCORES: dict[str, tuple[Remasking, ...]] = {
    "threshold": PROBABILITIES,
    "factor": PROBABILITIES,
    "entropy_bound": ("entropy",),
}

_LEAST = {"stability_threshold": 0}  # of an integer, where it is not 1
_ABOVE_ZERO = ("t_max",)  # numbers that may not be 0
_CHOICES = {"remasking": Remasking, "eos": Eos, "cache": Cache, "revise": Revise, "preset": Preset}


@dataclass(frozen=True)
class SamplerConfig:
    """What a caller wants of the sampler. None leaves a setting to the model's family and its generation_config.json.

    Attributes:
        preset: reference (the published sampler), balanced or fast (fewer or cheaper network calls); settings given
            beside it win over it
        steps: network calls for an answer, or for a canvas at the most (default: the family's)
        max_new_tokens: length of the answer (default: the family's, at most half of the context)
        eos: end-of-text token: allow (default), suppress or (with a mask token) defer
        entropy_bound: commit tokens by rising entropy while those before add up to at most this, in nats
        cache: none, prefix or dual (bidirectional attention; approximate), block (with canvases; exact)
        revise: none (default), remask or edit (with a mask token); redraw (with canvases)
        block_size: tokens of a block; blocks are denoised from left to right (32)
        temperature: temperature of the samples; 0 takes the most probable token (0)
        remasking: score that orders the masked tokens: low_confidence, entropy, margin, random or left_to_right
            (low_confidence)
        threshold: commit every token with at least this confidence, instead of a fixed number a call (none)
        factor: commit the r most confident tokens while the r-th has at least 1 - factor/(r + 1) (none)
        cfg_scale: scale of classifier-free guidance (0, off)
        refresh_interval: network calls after which a cache is computed anew (only where a block starts)
        revise_threshold: probability that remask and edit compare with (0.9)
        t_min: temperature of a canvas's last step (0.4)
        t_max: temperature of a canvas's first step (0.8)
        stability_threshold: steps without change before a canvas may stop (1)
        confidence_threshold: mean entropy, in nats, below which it then stops (0.005)

    Raises:
        SamplingError: a value outside its range, or two that exclude each other; the message names it.

    Example:
        >>> from unmask import SamplerConfig
        >>> SamplerConfig(max_new_tokens=64, threshold=0.9).given
        {'max_new_tokens': 64, 'threshold': 0.9}
        >>> SamplerConfig(remasking="random", threshold=0.9)
        Traceback (most recent call last):
        unmask.errors.SamplingError: remasking: random scores cannot be compared with threshold 0.9; use \
low_confidence or margin, or leave threshold out
    """

    steps: int | None = None
    max_new_tokens: int | None = None
    block_size: int | None = None
    temperature: float | None = None
    remasking: Remasking | None = None
    threshold: float | None = None
    cfg_scale: float | None = None
    eos: Eos | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    factor: float | None = None
    cache: Cache | None = None
    refresh_interval: int | None = None
    revise: Revise | None = None
    revise_threshold: float | None = None
    preset: Preset | None = None

    def __post_init__(self) -> None:
        given = self.given
        types = {field.name: field.type for field in dataclasses.fields(self)}  # texts, such as "int | None"
        for name, value in given.items():
            if types[name] == "int | None":
                least = _LEAST.get(name, 1)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise SamplingError(f"{name}: must be an integer of at least {least}, got {value!r}")
            elif types[name] == "float | None":
                bound = "above 0" if name in _ABOVE_ZERO else "of at least 0"
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise SamplingError(f"{name}: must be a number {bound}, got {value!r}")
                if not math.isfinite(value) or value < 0 or (value == 0 and name in _ABOVE_ZERO):
                    raise SamplingError(f"{name}: must be a finite number {bound}, got {value!r}")
        for name, choices in _CHOICES.items():
            if name in given and given[name] not in get_args(choices):
                raise SamplingError(f"{name}: {choice_problem(given[name], get_args(choices))}")
        check_rule(self)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are set, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def check_rule(settings: Any) -> None:
    """Refuse two rules at once, and a rule that cannot compare the scores; None as the score fits every rule.

    `settings` has `remasking` and the settings of `RULE_SCORES`; None = not set.
    """
    given = {name: value for name in RULE_SCORES if (value := getattr(settings, name)) is not None}
    if len(given) > 1:
        one, other = list(given)[:2]
        raise SamplingError(f"{one}: cannot be set together with {other}, since each is a rule; leave one out")
    for name, value in given.items():
        fitting = RULE_SCORES[name]
        if fitting and settings.remasking is not None and settings.remasking not in fitting:
            raise SamplingError(
                f"remasking: {settings.remasking} scores cannot be compared with {name} {value}; use "
                f"{' or '.join(fitting)}, or leave {name} out"
            )
