"""An adapter's folder in PEFT's format: which tensor of the file is which parameter, reading, writing, the card.

Keys are those of PEFT's `save_pretrained`. A weight that the reference class has under several names (the two roles of
DiffusionGemma) is written under each of them, and the copies must agree when they are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unmask.errors import ModelError
from unmask.models.folders import ADAPTER_WEIGHTS
from unmask.models.lora.experts import AdaptedExperts, from_file, to_file
from unmask.models.registry import family_of
from unmask.models.weights import write_tensors
from unmask.models.wrappers import without_parts
from unmask.places import check_regular

PREFIX = "base_model.model."  # PEFT's name for the wrapped network in its files
_MAGNITUDE = ".lora_magnitude_vector.default.weight"
_WHOLE = ".modules_to_save.default."


@dataclass(frozen=True)
class Slot:
    """One trained tensor and its place in the file.

    Attributes:
        key: PEFT's key under our own module names, without `PREFIX`.
        pack, unpack: parameter → matrix of the file, and back.
    """

    key: str
    parameter: nn.Parameter
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def is_trained(name: str) -> bool:
    """Say whether a parameter of an adapted network belongs to the adapter."""
    return ".lora_" in name or _WHOLE in name


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield every trained tensor of an adapted network."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedExperts)}
    for name, parameter in model.named_parameters():
        if not is_trained(name):
            continue
        owner = name.rpartition(".lora_")[0]
        if owner in stacks:
            yield _expert_slot(owner, name, parameter, stacks[owner])
        elif _WHOLE in name:
            yield Slot(name.replace(_WHOLE, "."), parameter, _same, _same)
        elif name.endswith(_MAGNITUDE):
            yield Slot(name.replace(_MAGNITUDE, ".lora_magnitude_vector"), parameter, _same, _same)
        else:
            yield Slot(name.replace(".default.", "."), parameter, _same, _same)


def _expert_slot(owner: str, name: str, parameter: nn.Parameter, experts: AdaptedExperts) -> Slot:
    """PEFT nests a wrapper a matrix: the last target is the outermost, each earlier one a `base_layer` deeper."""
    side, target = name.removeprefix(owner + ".").split(".")
    targets = list(experts.lora_A)
    depth = len(targets) - 1 - targets.index(target)
    key = f"{owner}{'.base_layer' * depth}.{side}.weight"
    number = len(parameter)
    return Slot(key, parameter, lambda t: to_file(side, t), lambda t: from_file(side, t, number))


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    try:
        check_regular(folder / ADAPTER_WEIGHTS)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: not a whole safetensors file ({error}); copy it again") from None


def stored_keys(folder: Path) -> dict[str, str]:
    """Return the keys of a folder's tensors, without `PREFIX` and names of wrappers → as they stand in the file.

    Raises:
        ModelError: the file is not whole or not PEFT's, or has one tensor twice.
    """
    with _opened(folder) as file:
        stored = list(file.keys())
    keys: dict[str, str] = {}
    for key in stored:
        name = without_parts(key)
        if not name.startswith(PREFIX):
            raise ModelError(
                f"adapter: {folder / ADAPTER_WEIGHTS} holds {key!r}, which is no tensor of PEFT's LoRA format"
            )
        while name.startswith(PREFIX):
            name = name.removeprefix(PREFIX)
        if (other := keys.setdefault(name, key)) != key:
            raise ModelError(f"adapter: {folder / ADAPTER_WEIGHTS} holds {other!r} and {key!r}, which are one tensor")
    return keys


def highest_rank(folder: Path) -> int:
    """Return the most rows that a folder's `lora_A` has (of stacked experts: all experts' together); 0 without one."""
    with _opened(folder) as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
    return max((shape[0] for shape in shapes if shape), default=0)


@torch.no_grad()
def read_adapter(model: nn.Module, folder: Path) -> None:
    """Copy a folder's adapter into the adapters already attached.

    Raises:
        ModelError: tensors missing or too many, of other shapes, or copies of one weight that differ.
    """
    targets, keys = family_of(model.config).lora, stored_keys(folder)
    left = set(keys)
    with _opened(folder) as file:
        for slot in slots(model):
            expected = targets.reference_names(slot.key)
            names = [name for name in expected if name in left]
            if not names:
                raise ModelError(
                    f"adapter: {folder} was made for another network or other layers (first: {PREFIX + slot.key} is "
                    "missing)"
                )
            if len(names) < len(expected):
                missing = next(name for name in expected if name not in left)
                raise ModelError(
                    f"adapter: {folder} has {PREFIX + names[0]} without {PREFIX + missing}, and both are of one weight "
                    "here; it was trained on one role alone and cannot be applied to the shared weight"
                )
            left.difference_update(names)
            slot.parameter.copy_(slot.unpack(_one_tensor(file, {name: keys[name] for name in names}, slot, folder)))
    if left:
        raise ModelError(
            f"adapter: {folder} was made for another network or other layers (first: {PREFIX + min(left)} has no place)"
        )


def _one_tensor(file: Any, keys: Mapping[str, str], slot: Slot, folder: Path) -> Tensor:
    """Return the tensor stored under each of the names, given with their keys; checked to be the same and to fit."""
    names = list(keys)
    tensor = file.get_tensor(keys[names[0]])
    wanted = slot.pack(slot.parameter).shape
    if tensor.shape != wanted:
        raise ModelError(
            f"adapter: {folder} was made for another network: {PREFIX + names[0]} has shape {tuple(tensor.shape)}, not "
            f"{tuple(wanted)}"
        )
    for name in names[1:]:
        if not torch.equal(file.get_tensor(keys[name]), tensor):
            raise ModelError(
                f"adapter: {folder}: {PREFIX + name} differs from {PREFIX + names[0]}, and both are of one weight "
                "here; it was trained with the two apart and cannot be applied to the shared weight"
            )
    return tensor


def write_adapter(model: nn.Module, config: Any, folder: Path) -> None:
    """Write the attached adapter as PEFT does, under every name of the reference class, with a card.

    `config` is a peft.LoraConfig with our names.
    """
    write_tensors(adapter_state(model), folder / ADAPTER_WEIGHTS)
    write_adapter_config(model, config, folder)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of an attached adapter on the host by PEFT's keys, as its file holds it."""
    targets = family_of(model.config).lora
    return {
        PREFIX + name: slot.pack(slot.parameter.detach()).cpu().clone(memory_format=torch.contiguous_format)
        for slot in slots(model)
        for name in targets.reference_names(slot.key)
    }


def write_adapter_config(model: nn.Module, config: Any, folder: Path) -> None:
    """Write what lies beside an adapter's tensors: adapter_config.json and the card. Arguments as `write_adapter`."""
    targets, written = family_of(model.config).lora, copy.deepcopy(config)
    for field in ("target_modules", "target_parameters", "modules_to_save"):
        names = getattr(config, field)
        if names is not None:
            setattr(written, field, sorted({theirs for name in names for theirs in targets.reference_names(name)}))
    written.inference_mode = True
    written.save_pretrained(str(folder))
    (folder / "README.md").write_text(_card(config, several=bool(targets.aliases)), encoding="utf-8")


def _card(config: Any, several: bool) -> str:
    base = config.base_model_name_or_path or "BASE"
    named = [f"base_model: {base}"] if config.base_model_name_or_path else []
    header = "".join(f"{line}\n" for line in ("---", *named, "library_name: peft", "---"))
    text = f"""{header}
# LoRA adapter

An adapter for `{base}`, in PEFT's format, trained with `unmask`. Answer with it, or merge it into the base:

```
unmask generate --checkpoint {base} --adapter FOLDER --prompt TEXT
unmask export --checkpoint {base} --adapter FOLDER --output MERGED
```
"""
    if several:
        text += """
**Merge with `unmask export`, not with PEFT's `merge_and_unload`.** The transformers class of this model has an encoder
and a decoder whose weights are tied, so this file holds each update twice, once for either. Unmerged, PEFT applies each
where it belongs; its merge adds both to the one weight, which doubles the update.
"""
    return text
