"""How an answer is sampled: what a caller may ask for, each family's settings, and the schedules that follow from them.

`SamplerConfig` is what a caller sets. A family's own class holds every setting it has, with its defaults, and
`resolve` joins the two. No torch here, so a bad setting is refused before anything heavy loads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

from unmask.errors import ModelError, SamplingError
from unmask.sections import choice_problem

Remasking = Literal["low_confidence", "random"]
Eos = Literal["allow", "suppress", "defer"]

_COUNTS = {"steps": 1, "max_new_tokens": 1, "block_size": 1, "stability_threshold": 0}  # name → least value
_NUMBERS = ("temperature", "cfg_scale", "threshold", "entropy_bound", "t_min", "t_max", "confidence_threshold")
_ABOVE_ZERO = ("t_max",)


@dataclass(frozen=True)
class SamplerConfig:
    """What a caller wants of the sampler. None leaves a setting to the model's family and its generation_config.json.

    Attributes:
        steps: network calls, at least 1: LLaDA's for the whole answer, DiffusionGemma's for a canvas at the most.
        max_new_tokens: length of the answer, at least 1.
        block_size: LLaDA's blocks; DiffusionGemma's is the model's canvas, and no other value is taken.
        temperature: LLaDA's; 0 takes the most likely token.
        remasking, threshold, cfg_scale: LLaDA's, see `MaskSettings`.
        eos: `allow`, `suppress` or (LLaDA) `defer`.
        entropy_bound, t_min, t_max, stability_threshold, confidence_threshold: DiffusionGemma's, see `CanvasSettings`.

    Raises:
        SamplingError: a value outside its range, or two that exclude each other; the message names it.
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

    def __post_init__(self) -> None:
        given = self.given
        for name in given.keys() & _COUNTS:
            value, least = given[name], _COUNTS[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SamplingError(f"{name}: must be an integer of at least {least}, got {value!r}")
        for name in given.keys() & set(_NUMBERS):
            value, bound = given[name], "above 0" if name in _ABOVE_ZERO else "of at least 0"
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SamplingError(f"{name}: must be a number {bound}, got {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and name in _ABOVE_ZERO):
                raise SamplingError(f"{name}: must be a finite number {bound}, got {value!r}")
        for name, choices in (("remasking", get_args(Remasking)), ("eos", get_args(Eos))):
            if name in given and given[name] not in choices:
                raise SamplingError(f"{name}: {choice_problem(given[name], choices)}")
        if self.remasking == "random" and self.threshold is not None:
            raise SamplingError(
                f"remasking: random scores cannot be compared with threshold {self.threshold}; use low_confidence, or "
                "leave threshold out"
            )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are set, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class MaskSettings:
    """LLaDA's sampler (Nie et al. 2025, appendix A.3; ML-GSAI/LLaDA, generate.py). Defaults are the published ones.

    Attributes:
        steps: network calls for the whole answer; shared out over the blocks, at least one each. Not used with
            `threshold`.
        max_new_tokens: length of the answer.
        block_size: the answer is denoised in blocks of this length from left to right; the last may be shorter.
        temperature: 0 takes the most likely token; T > 0 samples from softmax(logits / T).
        remasking: which open positions are settled first: `low_confidence` those with the most probable token (the
            others stay masked), `random` any. With `threshold` it must be `low_confidence`: random scores are no
            confidence to compare.
        threshold: settle every open position of the block whose score is at least this, and always one; None settles a
            fixed number a step. Above 1 it is one token a step, 0 one step a block.
        cfg_scale: s of classifier-free guidance, u + (s + 1)(c - u), where u has the prompt masked; 0 is off.
        eos: `allow`; `suppress` never writes the model's end-of-text token; `defer` settles stop tokens last.
    """

    family: ClassVar[str] = "LLaDA"

    steps: int = 128
    max_new_tokens: int = 128
    block_size: int = 32
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    eos: Eos = "allow"

    @property
    def rule(self) -> str:
        """Name of the selection rule that these settings ask for, a key of `rules.RULES`."""
        return "quota" if self.threshold is None else "threshold"

    @property
    def length(self) -> int:
        """Positions that are denoised for an answer."""
        return self.max_new_tokens


@dataclass(frozen=True)
class CanvasSettings:
    """DiffusionGemma's entropy-bound sampler (transformers, generation_diffusion_gemma.py). Defaults are the released.

    Attributes:
        steps: N, network calls for a canvas at the most.
        max_new_tokens: length of the answer; whole canvases are denoised and the last is cut.
        block_size: the model's canvas.
        eos: `allow`; `suppress` never writes one of the model's end-of-text tokens.
        entropy_bound: positions are accepted in order of rising entropy while those before a position have at most this
            much together, in nats (arXiv 2505.24857).
        t_min, t_max: temperature t_min + (t_max − t_min)·n/N at the call with n calls left, itself counted.
        stability_threshold: a canvas stops when its most likely tokens equal those of this many calls before …
        confidence_threshold: … and the mean entropy of its positions is below this, in nats.

    Raises:
        SamplingError: values that exclude each other.
    """

    family: ClassVar[str] = "DiffusionGemma"

    steps: int = 48
    max_new_tokens: int = 256
    block_size: int = 256
    eos: Eos = "allow"
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self) -> None:
        if self.t_min > self.t_max:
            raise SamplingError(f"t_min: {self.t_min} is above t_max {self.t_max}; the temperature falls from t_max")
        if self.eos == "defer":
            raise SamplingError("eos: a canvas settles all of its tokens at once, so none is deferred; use suppress")

    @property
    def rule(self) -> str:
        """Name of the selection rule, a key of `rules.RULES`."""
        return "entropy_bound"

    @property
    def length(self) -> int:
        """Positions that are denoised for an answer: whole canvases."""
        return -(-self.max_new_tokens // self.block_size) * self.block_size

    def temperature(self, step: int) -> float:
        """Return the temperature of call number `step` of a canvas, from 0."""
        return self.t_min + (self.t_max - self.t_min) * (self.steps - step) / self.steps


Settings = MaskSettings | CanvasSettings
_SettingsT = TypeVar("_SettingsT", bound=Settings)


def resolve(sampler: SamplerConfig | None, defaults: _SettingsT) -> _SettingsT:
    """Return a family's settings with what a caller has set put in.

    Raises:
        SamplingError: a setting that the family does not have, or a block size that is not the model's canvas.
    """
    given = sampler.given if sampler is not None else {}
    names = [field.name for field in dataclasses.fields(defaults)]
    for name, value in given.items():
        if name not in names:
            raise SamplingError(
                f"{name}: {defaults.family}'s sampler has no such setting; leave it out (it has {', '.join(names)})"
            )
        if name == "block_size" and isinstance(defaults, CanvasSettings) and value != defaults.block_size:
            raise SamplingError(
                f"block_size: {value} is not the model's canvas of {defaults.block_size} tokens; leave it out"
            )
    return dataclasses.replace(defaults, **given)


# Names in a generation_config.json → ours.
_GENERATION = {
    "max_denoising_steps": "steps",
    **{name: name for name in ("max_new_tokens", "t_min", "t_max", "stability_threshold", "confidence_threshold")},
}


def canvas_defaults(config: Any, generation: Mapping[str, Any]) -> CanvasSettings:
    """Return DiffusionGemma's settings of a checkpoint: its generation_config.json over the released values.

    Args:
        config: the network's configuration; its `canvas_length` is read.
        generation: the file's values; an entry that is missing or null is the released value.

    Raises:
        ModelError: a value that the sampler cannot take; names the file and the entry.
    """
    values = {ours: generation.get(theirs) for theirs, ours in _GENERATION.items()}
    bound = generation.get("sampler_config") or {}
    if not isinstance(bound, Mapping) or set(bound) - {"_cls_name", "entropy_bound"}:
        raise ModelError(f"generation_config.json: sampler_config must hold entropy_bound alone, got {bound!r}")
    try:
        sampler = SamplerConfig(**values, entropy_bound=bound.get("entropy_bound"))
        return resolve(sampler, CanvasSettings(block_size=config.canvas_length))
    except SamplingError as error:
        raise ModelError(f"generation_config.json: {error}") from None


def default_settings(config: Any, generation: Mapping[str, Any]) -> Settings:
    """Return the settings that a model has by itself; LLaDA's files hold none."""
    return canvas_defaults(config, generation) if hasattr(config, "canvas_length") else MaskSettings()


def block_sizes(max_new_tokens: int, block_size: int) -> tuple[int, ...]:
    """Return the lengths of the blocks from left to right; all `block_size` but the last, which has the rest."""
    whole, rest = divmod(max_new_tokens, block_size)
    return (block_size,) * whole + ((rest,) if rest else ())


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` integers that differ by at most one, the larger ones first."""
    each, more = divmod(total, parts)
    return (each + 1,) * more + (each,) * (parts - more)


def block_quotas(settings: MaskSettings) -> tuple[tuple[int, ...], ...]:
    """Return, for each block, how many tokens each of its network calls settles; the numbers add up to its length.

    A block has steps // blocks steps, the first ones one more until all are given out, and at least one. A step that
    would settle nothing (more steps than positions) is left out, because its network call could not change anything.
    """
    sizes = block_sizes(settings.max_new_tokens, settings.block_size)
    steps = shares(settings.steps, len(sizes))
    return tuple(
        tuple(quota for quota in shares(size, max(1, count)) if quota) for size, count in zip(sizes, steps, strict=True)
    )
