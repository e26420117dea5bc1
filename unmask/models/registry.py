"""The table of families, the `model` section, and what is known of a model before its weights load. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.config.model import ModelConfig
from unmask.errors import ModelError, choice_problem
from unmask.models.family import Family
from unmask.models.folders import (
    INDEX,
    WEIGHTS,
    choice_note,
    find_folder,
    read_generation,
    read_json,
    stored_tensors,
)
from unmask.models.pretrained_config import generation_note
from unmask.places import user_path

# Key of a family → its record as "module:attribute". A new family is a folder and a line here. The key is the
# model_type of its config.json, or its architecture where an earlier family has that model_type; its parsed
# configuration says it as `family`.
FAMILIES: dict[str, str] = {
    "llada": "unmask.models.llada.family:FAMILY",
    "diffusion_gemma": "unmask.models.diffusion_gemma.family:FAMILY",
    "Dream": "unmask.models.decoder.families:DREAM",
    "a2d-llama": "unmask.models.decoder.families:A2D_LLAMA",
    "a2d-qwen2": "unmask.models.decoder.families:A2D_QWEN2",
    "a2d-qwen3": "unmask.models.decoder.families:A2D_QWEN3",
}
# model_type of other models that people may try → why they do not run here.
_REFUSED = {
    **dict.fromkeys(
        ("gemma3_text", "llama", "mistral", "qwen2", "qwen3"),
        "is an autoregressive model, which was not trained to fill in masked tokens; give a diffusion language model",
    ),
    **dict.fromkeys(
        ("Fast_dLLM_Qwen", "sdar"),
        "is a diffusion model with block-causal attention, which is not supported yet; give one whose attention goes "
        "both ways",
    ),
}


@dataclass(frozen=True)
class ModelPlan:
    """What is known of a model before its weights load: enough to check a run against it.

    Attributes:
        config: the family's parsed configuration.
        config_json: the raw values, as an exported config.json carries them on.
        folder: where its weights are; None for a fresh network.
        hub_id: `owner/name` when the model was named so; None for a local one.
        notes: warnings for the user about its files, one line each.
    """

    family: Family
    config: Any
    config_json: dict[str, Any]
    folder: Path | None
    hub_id: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The hub id or folder of the model; "" for a fresh network."""
        return self.hub_id or str(self.folder or "")


def resolve(target: str) -> Any:
    """Import what a record names as "module:attribute"."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def family_named(values: Mapping[str, Any], where: str) -> Family:
    """Return the family that a config.json names by `architectures` and `model_type`.

    Raises:
        ModelError: a field of a wrong type, no `model_type`, one that no family here has, or an architecture that its
            family has not.
    """
    model_type, architectures = values.get("model_type"), values.get("architectures") or ()
    if not isinstance(model_type, str | None):
        raise ModelError(f"{where}: model_type must be text, got {model_type!r}")
    if not isinstance(architectures, list | tuple) or not all(isinstance(name, str) for name in architectures):
        raise ModelError(f"{where}: architectures must be a list of names, got {architectures!r}")
    key = next((name for name in architectures if name in FAMILIES), model_type)
    if key in _REFUSED:
        raise ModelError(f"{where}: model_type {key!r} {_REFUSED[key]} ({', '.join(FAMILIES)})")
    if key not in FAMILIES:
        raise ModelError(f"{where}: model_type {choice_problem(model_type, FAMILIES)}")
    family = resolve(FAMILIES[key])
    if architectures and not set(architectures) & set(family.architectures):
        raise ModelError(
            f"{where}: architectures {list(architectures)} is not supported; {family.name} is "
            f"{' or '.join(family.architectures)}"
        )
    return family


def family_of(config: Any) -> Family:
    """Return the family of a parsed configuration, such as a network's `config`, by its key."""
    return resolve(FAMILIES[config.family])


def register_configs() -> None:
    """Make transformers' AutoConfig, and with it AutoTokenizer, know the families that it lacks; repeatable."""
    for target in FAMILIES.values():
        family = resolve(target)
        if family.auto_config is not None:
            resolve(family.auto_config)()


def register() -> None:
    """Make transformers' Auto classes load the families that it lacks, without remote code; repeatable."""
    for target in FAMILIES.values():
        family = resolve(target)
        if family.auto is not None:
            resolve(family.auto)()


def plan_model(section: ModelConfig, weights: bool = True) -> ModelPlan:
    """Find and check everything about a model but its weights' values; needs no torch.

    Without `weights` those of a hub id stay where they are, for a plan that is only looked at.

    Raises:
        ModelError: a missing folder, a folder that is no checkpoint, a file cut short, an unsupported configuration.
    """
    if section.pretrained_model_name_or_path is not None:
        return plan_folder(section.pretrained_model_name_or_path, "model.pretrained_model_name_or_path", weights)
    if isinstance(section.config, str):
        path = user_path(section.config, "model.config")
        if path.is_dir():
            path = path / "config.json"
        values, where = read_json(path), str(path)
    else:
        values, where = dict(section.config or {}), "model.config"
    family = family_named(values, where)
    written = {"architectures": [family.architectures[0]], "model_type": family.model_type, **_portable(values, None)}
    return ModelPlan(family, family.parse_config(values, where), written, None, notes=_notes(family, values, None))


def plan_folder(name: str, where: str, weights: bool = True) -> ModelPlan:
    """As `plan_model`, for a folder, run directory or hub id given by name."""
    hub_id = None if user_path(name, where).is_dir() else name
    folder = find_folder(name, where, weights)
    path = folder / "config.json"
    values = read_json(path)
    family = family_named(values, str(path))
    config = family.parse_config(values, str(path))
    if weights or hub_id is None:
        stored_tensors(folder)
    notes = (choice_note(user_path(name, where), folder), *_notes(family, values, folder))
    return ModelPlan(family, config, _portable(values, hub_id), folder, hub_id, tuple(note for note in notes if note))


def _notes(family: Family, values: Mapping[str, Any], folder: Path | None) -> tuple[str, ...]:
    """Return what a model's files bring that is not used: generation settings, the second of two sets of weights."""
    generation = {} if folder is None else read_generation(folder)
    read = {entry.partition(".")[0] for entry in family.sampler.from_generation}
    notes = [generation_note(values, generation, read)]
    if folder is not None and (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        notes.append(
            f"{folder}: {WEIGHTS} is read, as transformers does, and the shards of {INDEX} beside it are not; remove "
            "the older of the two"
        )
    return tuple(note for note in notes if note)


def _portable(values: Mapping[str, Any], hub_id: str | None) -> dict[str, Any]:
    """Return config.json with an `auto_map` that holds without the code beside it.

    Transformers finds `owner/name--module.Class` in that repository. A class in the folder itself is written so when
    the folder is a hub's, and left out when it is local: its code does not come along.
    """
    auto_map = values.get("auto_map")
    if not isinstance(auto_map, dict):
        return dict(values)

    def elsewhere(target: Any) -> Any:
        if isinstance(target, (list, tuple)):  # a slow and a fast tokenizer
            targets = [elsewhere(item) for item in target]
            return targets if any(targets) else None
        if not isinstance(target, str) or "--" in target:
            return target
        return None if hub_id is None else f"{hub_id}--{target}"

    portable = {auto: target for auto, entry in auto_map.items() if (target := elsewhere(entry))}
    others = {key: value for key, value in values.items() if key != "auto_map"}
    return {**others, "auto_map": portable} if portable else others
