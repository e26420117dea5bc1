"""LoRA adapters in PEFT's file format (adapter_config.json, adapter_model.safetensors): attach, read, write, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.errors import ModelError
from unmask.models.adapter_folder import CONFIG, WEIGHTS, find_adapter
from unmask.models.folders import read_json
from unmask.models.weights import write_tensors

_PREFIX = "base_model.model."  # PEFT's name for the wrapped network in its files


def attach_adapter(model: nn.Module, config: Any) -> None:
    """Put fresh adapters of a peft.LoraConfig into a network in place and freeze everything else; adapters are fp32."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        trained = "lora_" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Attach a saved adapter to a network.

    Raises:
        ModelError: no adapter in the folder, or one made for another network.
    """
    from peft import PeftConfig

    folder = find_adapter(folder)
    kind = read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"adapter: {folder} is of peft_type {kind!r}; only LORA adapters can be applied")
    outside = [key for key in _read(folder) if ".blocks." not in key]
    if outside:
        # The head is read as a matrix and shares its name with each block's down projection; PEFT's suffixes hit both.
        raise ModelError(
            f"adapter: {folder} adapts {outside[0]!r}; only linear layers of blocks can be adapted, train it without"
        )
    config: Any = PeftConfig.from_pretrained(str(folder))
    try:
        attach_adapter(model, config)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"adapter: {folder} was made for another network ({reason[:200]})") from None
    read_adapter(model, folder)


@torch.no_grad()
def read_adapter(model: nn.Module, folder: Path) -> None:
    """Copy a folder's adapter weights into adapters already attached; ModelError when they are not the same set."""
    stored = _read(folder)
    places = _adapter_tensors(model)
    if set(stored) != set(places):
        odd = sorted(set(stored) ^ set(places))[0]
        raise ModelError(f"adapter: {folder} was made for another network or other layers (first: {odd})")
    for key, place in places.items():
        if stored[key].shape != place.shape:
            raise ModelError(f"adapter: {folder}: {key} has shape {tuple(stored[key].shape)}, not {tuple(place.shape)}")
        place.copy_(stored[key])


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS}: not a whole safetensors file ({error}); copy it again") from None


def write_adapter(model: nn.Module, config: Any, folder: Path) -> None:
    """Write the attached adapter as PEFT does."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in _adapter_tensors(model).items()}
    write_tensors(tensors, folder / WEIGHTS)
    config.save_pretrained(str(folder))


def merge_adapter(model: nn.Module) -> None:
    """Add W ← W + (alpha/r)·B·A for every adapted layer and take the adapters out again, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        _PREFIX + name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
