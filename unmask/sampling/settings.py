"""How an answer is sampled: what a family releases, a checkpoint says and a caller asks for, joined and checked.

`SamplerConfig` is what a caller asks for; `SamplerSettings` is what the loop goes by. No torch, so that a bad setting
is refused before anything heavy loads.
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
    """What the sampler for one kind of noise and attention can do.

    Attributes:
        fields: the settings that it has.
        choices: setting → the values that it takes, where it does not take all.
        reasons: setting → why it takes no other.
    """

    fields: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, str]


# (noise, attention) → its sampler.
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
    """What the denoising loop goes by; `SamplerConfig` describes the settings.

    A setting that the sampler of this noise and attention does not have is None, and so is the rule that is not chosen
    (`threshold`, `factor`, `entropy_bound`).

    Attributes:
        family: what messages call the model.
        noise, attention: the family's.

    Raises:
        SamplingError: values that exclude each other, or that the sampler does not take.
    """

    family: str
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
                raise SamplingError(f"{name}: {self.family}'s sampler has no {value}{why}; use {' or '.join(choices)}")

    @property
    def _scheme(self) -> Scheme:
        return SCHEMES[self.noise, self.attention]

    @property
    def values(self) -> dict[str, Any]:
        """The settings that there are, by name."""
        return {name: getattr(self, name) for name in self._scheme.fields}

    @property
    def rule(self) -> str:
        """Name of the rule that says which positions take their token, a key of `rules.RULES`."""
        return next((name for name in RULE_SCORES if getattr(self, name) is not None), "quota")

    @property
    def length(self) -> int:
        """Positions that are denoised for an answer: of canvases whole ones."""
        if self.attention == "canvas":
            return -(-self.max_new_tokens // self.block_size) * self.block_size
        return self.max_new_tokens

    def calls(self, sizes: Sequence[int]) -> Sequence[int]:
        """Return how many calls the blocks of an answer are planned to take, given how many are masked in each.

        Canvases have `steps` at the most, whatever is masked in them, and stop by themselves.
        """
        return [self.steps] * len(sizes) if self.noise == "uniform" else planned_calls(sizes, self.steps)

    def temperature_at(self, step: int) -> float:
        """Return the temperature of call number `step` of a block, from 0."""
        if self.t_min is None or self.t_max is None:
            return self.temperature or 0.0
        return self.t_min + (self.t_max - self.t_min) * (self.steps - step) / self.steps

    @property
    def _outdated(self) -> bool:
        """Whether calls read keys and values that are out of date."""
        return self.cache in ("prefix", "dual") and self.refresh_interval != 1

    @property
    def cuts(self) -> bool:
        """Whether the blocks after a committed stop token are left out of later calls.

        It is exact only where nothing before the stop token is masked, which sees their masks; so it is done where the
        cache is approximate anyway. A revised stop token would need them back.
        """
        return self._outdated and self.revise == "none"

    @property
    def approximations(self) -> tuple[str, ...]:
        """What is not computed by full forwards, in words; empty where everything is.

        Rules, scores, steps and ways to revise other than the published are other algorithms, no approximation.
        """
        if not self._outdated:
            return ()
        often = "" if self.refresh_interval is None else f" and every {self.refresh_interval} calls"
        cut = ("blocks after a committed stop token are left out",) if self.cuts else ()
        return (f"{self.cache} cache, computed anew at block starts{often}", *cut)

    @property
    def exact(self) -> bool:
        """Whether every call computes what a full forward would: there are no `approximations`."""
        return not self.approximations

    @property
    def note(self) -> str:
        """What is to be said beside whatever these settings gave: empty where they are exact."""
        return "" if self.exact else f"approximate sampling: {'; '.join(self.approximations)}"


def settings_of(family: Family, **values: Any) -> SamplerSettings:
    """Return a family's released settings with some values put in.

    Raises: as `SamplerSettings`.
    """
    return SamplerSettings(family.name, family.noise, family.attention, **{**family.sampler.values, **values})


def settings_for(model: Any, sampler: SamplerConfig | None = None) -> SamplerSettings:
    """Return what a network is sampled with; raises as `resolve_settings`, and SamplingError for no known family."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        raise SamplingError(
            f"cannot sample from a {type(model).__name__}; load one of {', '.join(sorted(FAMILIES))} with "
            "unmask.load_model"
        )
    return resolve_settings(sampler, family_of(config), config, getattr(model, "generation", {}))


def resolve_settings(
    sampler: SamplerConfig | None, family: Family, config: Any, generation: Mapping[str, Any]
) -> SamplerSettings:
    """Return the settings of a checkpoint: released < its files < a preset < what a caller sets.

    The released length of an answer is at most half of what the model can see at once.

    Args:
        sampler: what a caller sets; None = nothing.
        family: the model's.
        config: its parsed config.json.
        generation: the values of its generation_config.json, where null is as if missing.

    Raises:
        SamplingError: a setting that the sampler does not have, that would have no effect, or that the model fixes.
        ModelError: a bad value in generation_config.json; names the file and the entry.
    """
    fixed = {name: getattr(config, attribute) for name, attribute in family.sampler.from_config.items()}
    length = max(1, min(family.sampler.values["max_new_tokens"], config.max_sequence_length // 2))
    try:
        stored = _stored_settings(generation, family.sampler.from_generation)
        released = settings_of(family, **{"max_new_tokens": length} | fixed | stored)
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
    settings = settings_of(family, **released.values | values)
    if settings.cache in ("prefix", "dual") and not family.sampler.window_cache:
        raise SamplingError(f"cache: {family.name}'s network takes no keys and values of calls before; use none")
    if "refresh_interval" in given and settings.cache == "none":
        raise SamplingError("refresh_interval: there is no cache to compute anew; set cache to prefix or dual")
    if "revise_threshold" in given and settings.revise == "none":
        raise SamplingError("revise_threshold: nothing is revised; set revise to remask or edit")
    blocks, rest = divmod(settings.length, settings.block_size)
    check_remask(settings, [settings.block_size] * blocks + [rest])
    return settings


def _stored_settings(generation: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in a generation_config.json, given entry → setting; raises SamplingError, naming the entry.

    An entry within an entry is written with a dot; what stands beside it there, but for `_names`, is refused.
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
    """Return what a preset adds to the settings that are given, which win over it.

    A given rule (or number of steps, or score that is no probability) takes the place of the preset's rule altogether:
    beside it, it would contradict it or mean nothing. A score that is a probability keeps the preset's rule.
    """
    values = {} if preset is None else dict(family.sampler.presets[preset])
    replaced = any(name in given for name in (*RULE_SCORES, "steps"))
    if replaced or given.get("remasking", PROBABILITIES[0]) not in PROBABILITIES:
        values = {name: value for name, value in values.items() if name not in RULE_SCORES}
    return {name: value for name, value in values.items() if name not in given}


def planned_calls(sizes: Sequence[int], steps: int) -> tuple[int, ...]:
    """Share steps out over the blocks of an answer (LLaDA, generate.py).

    The blocks with something masked have steps // blocks calls each, the first ones one more until all are given out,
    and at least one. A call that would commit nothing could not change anything and is left out, so there are no more
    of them than masked positions.

    Args:
        sizes: masked positions of each block at the start; 0 where all are given, and then no call is made.
        steps: calls for the whole answer.
    """
    blocks = sum(size > 0 for size in sizes)
    each, more = divmod(steps, max(1, blocks))
    shares = iter([each + 1] * more + [each] * (blocks - more))
    return tuple(min(size, max(1, next(shares))) if size else 0 for size in sizes)


def check_remask(settings: SamplerSettings, sizes: Sequence[int]) -> None:
    """Refuse to mask tokens again where every call commits one: fewer are taken back than a call commits, so none.

    `sizes` are the masked positions of each block of the answer.
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
