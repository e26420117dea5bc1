"""How an answer is sampled: what a caller may ask for, and how it joins what a model's family has.

`SamplerConfig` is what a caller sets. A family's own class (`family_settings.py`) holds every setting it has, with its
defaults, and `resolve` joins the two. No torch here, so a bad setting is refused before anything heavy loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from unmask.config.sampler import SamplerConfig
from unmask.errors import ModelError, SamplingError
from unmask.sampling.engine.schedule import planned_calls
from unmask.sampling.family_settings import CanvasSettings, MaskSettings, Settings
from unmask.sampling.presets import preset_settings

_SettingsT = TypeVar("_SettingsT", bound=Settings)


def resolve(sampler: SamplerConfig | None, defaults: _SettingsT) -> _SettingsT:
    """Return a family's settings with a preset's and then what a caller has set put in.

    Raises:
        SamplingError: a setting that the family does not have, one that would have no effect, or a block size that is
            not the model's canvas.
    """
    given = sampler.given if sampler is not None else {}
    preset = given.pop("preset", None)
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
    values = preset_settings(defaults.family, preset, given) | given
    if isinstance(defaults, MaskSettings) and "entropy_bound" in values:
        values.setdefault("remasking", "entropy")
    settings = dataclasses.replace(defaults, **values)
    if "refresh_interval" in given and settings.cache == "none":
        raise SamplingError("refresh_interval: there is no cache to compute anew; set cache to prefix or dual")
    if "revise_threshold" in given and settings.revise == "none":
        raise SamplingError("revise_threshold: nothing is revised; set revise to remask or edit")
    if isinstance(settings, MaskSettings) and settings.revise == "remask":
        sizes = [settings.block_size] * (settings.length // settings.block_size)
        check_remask(settings, [*sizes, settings.length % settings.block_size])
    return settings


def check_remask(settings: MaskSettings, sizes: Sequence[int]) -> None:
    """Refuse to mask tokens again where every call settles one: fewer are taken back than a call settles, so none.

    Args:
        settings: of the answer.
        sizes: open positions of each of its blocks.

    Raises:
        SamplingError: it would have no effect; names the remedy.
    """
    counted = settings.rule == "quota" and all(
        calls == size for calls, size in zip(planned_calls(sizes, settings.steps), sizes, strict=True)
    )
    if settings.revise == "remask" and (counted or (settings.threshold is not None and settings.threshold > 1)):
        why = f"{settings.steps} steps for {sum(sizes)} tokens" if counted else f"threshold {settings.threshold}"
        raise SamplingError(
            f"revise: remask takes back fewer tokens than a call settles, and with {why} that is one; "
            "set threshold (0.9, say) or fewer steps"
        )


def _fitting(default: int, config: Any) -> int:
    """Return a family's length of an answer, at most half of what the model can see at once."""
    return max(1, min(default, config.max_sequence_length // 2))


# Names in a generation_config.json → ours.
_GENERATION = {
    "max_denoising_steps": "steps",
    **{name: name for name in ("max_new_tokens", "t_min", "t_max", "stability_threshold", "confidence_threshold")},
}


def canvas_defaults(config: Any, generation: Mapping[str, Any]) -> CanvasSettings:
    """Return DiffusionGemma's settings of a checkpoint: its generation_config.json over the released values.

    Args:
        config: the network's configuration; `canvas_length` and `max_sequence_length` are read.
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
        length = _fitting(CanvasSettings.max_new_tokens, config)
        return resolve(sampler, CanvasSettings(block_size=config.canvas_length, max_new_tokens=length))
    except SamplingError as error:
        raise ModelError(f"generation_config.json: {error}") from None


def mask_defaults(config: Any, generation: Mapping[str, Any]) -> MaskSettings:
    """Return LLaDA's settings: the published ones, since its files hold none; the answer no longer than there is room.

    Args:
        config: the network's configuration; its `max_sequence_length` is read.
        generation: not used.
    """
    return MaskSettings(max_new_tokens=_fitting(MaskSettings.max_new_tokens, config))


@dataclass(frozen=True)
class FamilySampler:
    """How a family is sampled.

    Attributes:
        module: where its adapter is; imported when it is used.
        adapter: the adapter's class there, made with (model, settings).
        defaults: (configuration, values of generation_config.json) → the settings that a model has by itself.
    """

    module: str
    adapter: str
    defaults: Callable[[Any, Mapping[str, Any]], Settings]


# Name of a configuration's class → how its family is sampled. A new family is a line here.
SAMPLERS: dict[str, FamilySampler] = {
    "LLaDAConfig": FamilySampler("unmask.sampling.backends.bidirectional", "BidirectionalBackend", mask_defaults),
    "DiffusionGemmaConfig": FamilySampler("unmask.sampling.backends.canvas", "CanvasBackend", canvas_defaults),
}


def family_sampler(config: Any, model: Any = None) -> FamilySampler:
    """Return how models with this configuration are sampled; `model` is named where there is no way.

    Raises:
        SamplingError: a configuration of no family that can be sampled from.
    """
    name = type(config).__name__
    if name not in SAMPLERS:
        what = "a model" if model is None else f"a {type(model).__name__}"
        raise SamplingError(
            f"cannot sample from {what} with a {name}; load it with unmask.load_model ({', '.join(sorted(SAMPLERS))})"
        )
    return SAMPLERS[name]


def default_settings(config: Any, generation: Mapping[str, Any]) -> Settings:
    """Return the settings that a model has by itself: its generation_config.json's over its family's.

    Raises:
        SamplingError: a configuration of no family that can be sampled from.
        ModelError: a bad value in the file.
    """
    return family_sampler(config).defaults(config, generation)
