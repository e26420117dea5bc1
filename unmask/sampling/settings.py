"""Resolves sampler settings: a family's defaults, then the checkpoint's, then the caller's, merged and checked.

`SamplerConfig` is what a caller gives; `SamplerSettings` is the complete result. No torch, so that a bad setting is
refused before anything heavy loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from unmask.config.sampler import PROBABILITIES, RULE_SCORES, Cache, Eos, Remasking, Revise, SamplerConfig, check_rule
from unmask.errors import ModelError, SamplingError
from unmask.models.family import Attention, Family, Noise
from unmask.models.registry import FAMILIES, family_of

SETTINGS = tuple(field.name for field in fields(SamplerConfig) if field.name != "preset")


@dataclass(frozen=True)
class Scheme:
    """The settings that the sampler for one kind of noise and attention has."""

    fields: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]  # setting → the values allowed, where not all are
    reasons: Mapping[str, str]  # setting → why no other is: continues "sampler has no VALUE, …"


SCHEMES: dict[tuple[Noise, Attention], Scheme] = {
    # LLaDA (Nie et al. 2025, appendix A.3; ML-GSAI/LLaDA, generate.py).
    ("mask", "bidirectional"): Scheme(
        fields=(
            "steps", "max_new_tokens", "block_size", "temperature", "remasking", "threshold", "cfg_scale", "eos",
            "factor", "entropy_bound", "cache", "refresh_interval", "revise", "revise_threshold",
        ),
        choices={"cache": ("none", "prefix", "dual"), "revise": ("none", "remask", "edit")},
        reasons={"cache": "which keeps finished blocks: where attention goes both ways, they change with every token"},
    ),
    # DiffusionGemma (transformers, generation_diffusion_gemma.py).
    ("uniform", "canvas"): Scheme(
        fields=(
            "steps", "max_new_tokens", "block_size", "eos", "entropy_bound", "t_min", "t_max", "stability_threshold",
            "confidence_threshold", "cache", "revise",
        ),
        choices={"cache": ("block", "none"), "revise": ("redraw",), "eos": ("allow", "suppress")},
        reasons={
            "cache": "which is approximate: finished canvases never change, and block keeps them exactly",
            "eos": "since a canvas commits all of its tokens at once",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SamplerSettings:
    """The complete settings of the denoising loop; `SamplerConfig` describes each.

    A setting that the sampler of this noise and attention does not have is None, and so is the rule that is not chosen
    (`threshold`, `factor`, `entropy_bound`).

    Raises:
        SamplingError: values that exclude each other, or that the sampler does not take.
    """

    family: str  # what messages call the model
    noise: Noise
    attention: Attention
    steps: int
    max_new_tokens: int
    block_size: int
    eos: Eos
    cache: Cache
    revise: Revise
    temperature: float | None = None
    remasking: Remasking | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    cfg_scale: float | None = None
    refresh_interval: int | None = None
    revise_threshold: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.noise, self.attention) not in SCHEMES:
            raise SamplingError(f"{self.family}: no sampler for {self.noise} noise and {self.attention} attention")
        names = self._scheme.fields
        for name in SETTINGS:
            if name not in names and getattr(self, name) is not None:
                raise SamplingError(
                    f"{name}: {self.family}'s sampler has no such setting; leave it out (it has {', '.join(names)})"
                )
        check_rule(self)
        if self.t_min is not None and self.t_max is not None and self.t_min > self.t_max:
            raise SamplingError(f"t_min: {self.t_min} is above t_max {self.t_max}; the temperature falls from t_max")
        for name, choices in self._scheme.choices.items():
            value, reason = getattr(self, name), self._scheme.reasons.get(name)
            if value not in choices:
                why = "" if reason is None else f", {reason}"
                use = " or ".join(", ".join(choices).rsplit(", ", 1))
                raise SamplingError(f"{name}: {self.family}'s sampler has no {value}{why}; use {use}")

    @property
    def _scheme(self) -> Scheme:
        return SCHEMES[self.noise, self.attention]

    @property
    def values(self) -> dict[str, Any]:
        """The settings that this sampler has, by name."""
        return {name: getattr(self, name) for name in self._scheme.fields}

    @property
    def rule(self) -> str:
        """Name of the rule that picks the positions to commit, a key of `rules.RULES`."""
        return next((name for name in RULE_SCORES if getattr(self, name) is not None), "quota")

    @property
    def length(self) -> int:
        """Positions denoised for an answer: `max_new_tokens`, rounded up to whole canvases."""
        if self.attention == "canvas":
            return -(-self.max_new_tokens // self.block_size) * self.block_size
        return self.max_new_tokens

    def calls(self, sizes: Sequence[int]) -> Sequence[int]:
        """Return the planned number of calls for each block, given how many positions of each are masked.

        For a canvas it is the most, `steps`: it may stop sooner.
        """
        return [self.steps] * len(sizes) if self.noise == "uniform" else planned_calls(sizes, self.steps)

    def temperature_at(self, step: int) -> float:
        """Return the temperature of call number `step` of a block, from 0."""
        if self.t_min is None or self.t_max is None:
            return self.temperature or 0.0
        return self.t_min + (self.t_max - self.t_min) * (self.steps - step) / self.steps

    @property
    def _stale(self) -> bool:
        """Whether calls read keys and values that are out of date."""
        return self.cache in ("prefix", "dual") and self.refresh_interval != 1

    @property
    def drops_after_stop(self) -> bool:
        """Whether later calls leave out the blocks after a committed stop token.

        Masked positions before the stop token would see those blocks, so this is done only where the cache is
        approximate anyway, and not where a stop token may be revised.
        """
        return self._stale and self.revise == "none"

    @property
    def approximations(self) -> tuple[str, ...]:
        """In words, how calls differ from full forwards; empty where they do not.

        Other rules, scores, steps or revisers than the published ones are other algorithms, not approximations.
        """
        if not self._stale:
            return ()
        often = "" if self.refresh_interval is None else f" and every {self.refresh_interval} calls"
        cut = ("blocks after a committed stop token are left out",) if self.drops_after_stop else ()
        return (f"{self.cache} cache, computed anew at block starts{often}", *cut)

    @property
    def exact(self) -> bool:
        """Whether every call computes what a full forward would: there are no `approximations`."""
        return not self.approximations

    @property
    def note(self) -> str:
        """The approximations as one line to print beside results; empty where sampling is exact."""
        return "" if self.exact else f"approximate sampling: {'; '.join(self.approximations)}"


def family_settings(family: Family, **values: Any) -> SamplerSettings:
    """Return a family's default settings with some values replaced.

    Raises: as `SamplerSettings`.
    """
    return SamplerSettings(family.name, family.noise, family.attention, **{**family.sampler.values, **values})


def settings_for(model: Any, sampler: SamplerConfig | None = None) -> SamplerSettings:
    """`resolve_settings` of a network in memory; raises SamplingError for no known family, too."""
    config = getattr(model, "config", None)
    if getattr(config, "family", None) not in FAMILIES:
        raise SamplingError(
            f"cannot sample from a {type(model).__name__}; load one of {', '.join(sorted(FAMILIES))} with "
            "unmask.load_model"
        )
    return resolve_settings(sampler, family_of(config), config, getattr(model, "generation", {}))


def resolve_settings(
    sampler: SamplerConfig | None, family: Family, config: Any, generation: Mapping[str, Any]
) -> SamplerSettings:
    """Return a checkpoint's settings. Later ones win: family defaults, the checkpoint's files, preset, caller.

    The default `max_new_tokens` is at most half of the model's longest sequence.

    Args:
        sampler: what a caller sets; None = nothing.
        family: the model's.
        config: its parsed config.json.
        generation: the values of its generation_config.json; null counts as missing.

    Raises:
        SamplingError: a setting that the sampler does not have, that would have no effect, or that the model fixes.
        ModelError: a bad value in generation_config.json; names the file and the entry.
    """
    fixed = {name: getattr(config, attribute) for name, attribute in family.sampler.from_config.items()}
    length = max(1, min(family.sampler.values["max_new_tokens"], config.max_sequence_length // 2))
    try:
        stored = _stored_settings(generation, family.sampler.from_generation)
        released = family_settings(family, **{"max_new_tokens": length} | fixed | stored)
    except SamplingError as error:
        raise ModelError(f"generation_config.json: {error}") from None
    given = sampler.given if sampler is not None else {}
    preset = given.pop("preset", None)
    for name in fixed.keys() & given.keys():
        if given[name] != fixed[name]:
            what = f"{family.sampler.from_config[name]} of {fixed[name]}"
            raise SamplingError(f"{name}: {given[name]} is not the model's {what}; leave it out")
    values = _preset_settings(family, preset, given) | given
    if "entropy_bound" in values and released.remasking is not None:
        values.setdefault("remasking", "entropy")
    settings = family_settings(family, **released.values | values)
    if settings.cache in ("prefix", "dual") and not family.sampler.window_cache:
        raise SamplingError(f"cache: {family.name}'s network takes no keys and values of calls before; use none")
    if "refresh_interval" in given and settings.cache == "none":
        raise SamplingError("refresh_interval: there is no cache to compute anew; set cache to prefix or dual")
    if "revise_threshold" in given and settings.revise == "none":
        raise SamplingError("revise_threshold: nothing is revised; set revise to remask or edit")
    if settings.length > config.max_sequence_length:  # before a list of its blocks is made
        raise SamplingError(
            f"max_new_tokens: {settings.length} tokens are over the model's max_sequence_length "
            f"{config.max_sequence_length}; give fewer"
        )
    blocks, rest = divmod(settings.length, settings.block_size)
    check_remask(settings, [settings.block_size] * blocks + [rest])
    return settings


def _stored_settings(generation: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in a generation_config.json, given entry → setting; raises SamplingError, naming the entry.

    "outer.inner" names a nested entry; unknown siblings of one are refused, except `_names`.
    """
    values: dict[str, Any] = {}
    for entry, setting in names.items():
        outer, _, inner = entry.partition(".")
        value = generation.get(outer)
        if inner and value is not None:
            siblings = {name.partition(".")[2] for name in names if name.startswith(f"{outer}.")}
            if not isinstance(value, Mapping) or any(key not in siblings for key in value if not key.startswith("_")):
                raise SamplingError(f"{outer} must hold {' and '.join(sorted(siblings))} alone, got {value!r}")
            value = value.get(inner)
        values[setting] = value
    return SamplerConfig(**values).given


def _preset_settings(family: Family, preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preset's settings without those that are given, which win over it.

    A given rule, `steps`, or score that is no probability also drops the preset's rule, which would contradict it or
    mean nothing.
    """
    if preset is not None and preset not in family.sampler.presets:
        there = " or ".join(family.sampler.presets)
        raise SamplingError(f"preset: {family.name} has no {preset}, whose sampler is not there; use {there}")
    values = {} if preset is None else dict(family.sampler.presets[preset])
    replaced = any(name in given for name in (*RULE_SCORES, "steps"))
    if replaced or given.get("remasking", PROBABILITIES[0]) not in PROBABILITIES:
        values = {name: value for name, value in values.items() if name not in RULE_SCORES}
    return {name: value for name, value in values.items() if name not in given}


def planned_calls(sizes: Sequence[int], steps: int) -> tuple[int, ...]:
    """Divide steps among the blocks of an answer (LLaDA, generate.py).

    Each block with masked positions has steps // blocks calls, the first ones one more for the remainder; at least one,
    and at most one for each masked position, since a call that commits nothing would change nothing.

    Args:
        sizes: masked positions of each block at the start; 0 = no call.
        steps: calls for the whole answer.
    """
    blocks = sum(size > 0 for size in sizes)
    each, more = divmod(steps, max(1, blocks))
    shares = iter([each + 1] * more + [each] * (blocks - more))
    return tuple(min(size, max(1, next(shares))) if size else 0 for size in sizes)


def check_remask(settings: SamplerSettings, sizes: Sequence[int]) -> None:
    """Refuse `revise: remask` where each call commits one token: it takes back fewer than that, so none.

    `sizes`: masked positions of each block of the answer.
    """
    if settings.revise != "remask":
        return
    counted = settings.rule == "quota" and planned_calls(sizes, settings.steps) == tuple(sizes)
    if counted or (settings.threshold is not None and settings.threshold > 1):
        why = f"{settings.steps} steps for {sum(sizes)} tokens" if counted else f"threshold {settings.threshold}"
        raise SamplingError(
            f"revise: remask takes back fewer tokens than a call commits, and with {why} that is one; "
            "set threshold (0.9, say) or fewer steps"
        )
