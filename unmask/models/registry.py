"""From a name to a network: the table of families, the `model` section, and loading. Torch loads last."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unmask.errors import FieldError, ModelError
from unmask.models.family import Family
from unmask.models.folders import find_folder, is_plain, read_generation, read_json, weight_files
from unmask.sections import choice_problem

if TYPE_CHECKING:
    from torch import nn

# model_type of a config.json → the module whose FAMILY describes it. A new family is a folder and a line here.
FAMILIES: dict[str, str] = {
    "llada": "unmask.models.llada.family",
    "diffusion_gemma": "unmask.models.diffusion_gemma.family",
}


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`: which network to train.

    Attributes:
        pretrained_model_name_or_path: a local folder, a run directory or a hub id.
        config: instead of the above, a fresh network: the fields of a config.json inline, or the path of one.
        torch_dtype: dtype of the trained (master) weights.
    """

    pretrained_model_name_or_path: str | None = None
    config: dict[str, Any] | str | None = None
    torch_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.pretrained_model_name_or_path is None) == (self.config is None):
            raise FieldError(
                "pretrained_model_name_or_path",
                "set either this (a folder or hub id) or model.config (a fresh network), and not both",
            )


@dataclass(frozen=True)
class ModelPlan:
    """What is known of a model before its weights load: enough to check a run against it.

    Attributes:
        family: the model's family.
        config: the family's parsed configuration.
        config_json: the raw values, as an exported config.json carries them on.
        folder: where its weights are; None for a fresh network.
        hub_id: `owner/name` when the model was named so; None for a local one.
    """

    family: Family
    config: Any
    config_json: dict[str, Any]
    folder: Path | None
    hub_id: str | None = None

    @property
    def source(self) -> str:
        """The hub id or folder of the model; "" for a fresh network."""
        return self.hub_id or str(self.folder or "")


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """Return the family that a config.json names.

    Raises:
        ModelError: no `model_type`, or one that no family here has.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"{where}: model_type {choice_problem(model_type, FAMILIES)}")
    return importlib.import_module(FAMILIES[model_type]).FAMILY


def plan_model(section: ModelConfig, weights: bool = True) -> ModelPlan:
    """Find and check everything about a model but its weights' values; needs no torch.

    Args:
        section: the `model` section.
        weights: False leaves the weights of a hub id where they are, for a plan that is only looked at.

    Raises:
        ModelError: a missing folder, a folder that is no checkpoint, a file cut short, an unsupported configuration.
    """
    if section.pretrained_model_name_or_path is not None:
        return plan_folder(section.pretrained_model_name_or_path, "model.pretrained_model_name_or_path", weights)
    if isinstance(section.config, str):
        path = Path(section.config).expanduser()
        if path.is_dir():
            path = path / "config.json"
        values, where = read_json(path), str(path)
    else:
        values, where = dict(section.config or {}), "model.config"
    family = family_of(values, where)
    written = {"architectures": [family.architecture], "model_type": family.model_type, **_portable(values, None)}
    return ModelPlan(family, family.parse_config(values, where), written, None)


def plan_folder(name: str, where: str, weights: bool = True) -> ModelPlan:
    """As `plan_model`, for a folder, run directory or hub id given by name."""
    hub_id = None if Path(name).expanduser().is_dir() else name
    folder = find_folder(name, where, weights)
    path = folder / "config.json"
    values = read_json(path)
    family = family_of(values, str(path))
    config = family.parse_config(values, str(path))
    if (weights or hub_id is None) and is_plain(folder):
        weight_files(folder)
    return ModelPlan(family, config, _portable(values, hub_id), folder, hub_id)


def build_model(plan: ModelPlan, dtype: str | None, device: Any = "cpu", seed: int = 42) -> nn.Module:
    """Load a planned model's weights, or draw them for a fresh one from `seed`.

    A loaded network has the values of its generation_config.json as `model.generation`, which sampling starts from.

    Args:
        plan: from `plan_model` or `plan_folder`.
        dtype: `float32`, `bfloat16` or `float16`; None = as stored (float32 for a fresh model).
        device: where the parameters go.
        seed: for fresh weights only.
    """
    import torch

    from unmask import rng
    from unmask.models.weights import load_weights

    kind = None if dtype is None else getattr(torch, dtype)
    with torch.device("meta"):
        model = plan.family.build(plan.config)
    if plan.folder is not None:
        load_weights(model, plan.folder, kind, device, plan.family.layout)
        model.generation = read_generation(plan.folder)  # pyright: ignore[reportArgumentType]
        return model
    model.to_empty(device="cpu")
    plan.family.initialise(model, torch.Generator().manual_seed(rng.key(seed, "model/init") % 2**32))
    return model.to(device=device, dtype=kind)


def load_model(name: str, dtype: str | None = None, device: Any = "cpu", adapter: str | None = None) -> nn.Module:
    """Load a checkpoint for inference, without remote code.

    Args:
        name: a folder in the released layout, a run directory or a hub id.
        dtype: `float32`, `bfloat16` or `float16`; None = as stored.
        device: a torch device.
        adapter: folder of a LoRA adapter in PEFT's format to apply on top.

    Returns:
        the network in eval mode: LLaDA's forward gives hidden states (B, L, D), `.logits` the logits (B, L, V).

    Raises:
        ModelError: what is missing, cut short or not supported.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {choice_problem(dtype, ('float32', 'bfloat16', 'float16'))}")
    model = build_model(plan_folder(name, "checkpoint"), dtype, device)
    if adapter is not None:
        from unmask.models.adapter import load_adapter

        load_adapter(model, adapter)
    return model.eval()


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
            found = [elsewhere(item) for item in target]
            return found if any(found) else None
        if not isinstance(target, str) or "--" in target:
            return target
        return None if hub_id is None else f"{hub_id}--{target}"

    kept = {auto: target for auto, entry in auto_map.items() if (target := elsewhere(entry))}
    others = {key: value for key, value in values.items() if key != "auto_map"}
    return {**others, "auto_map": kept} if kept else others
