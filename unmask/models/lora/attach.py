"""LoRA adapters (PEFT's modules, and ours on stacked experts): attach to a network, load, merge into its weights.

PEFT takes seconds to import: modules that do not always need it import this one where they do.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from unmask.errors import ModelError
from unmask.models.experts import Experts
from unmask.models.family import LoraTargets
from unmask.models.folders import ADAPTER_CONFIG, find_adapter, read_json
from unmask.models.lora.experts import AdaptedExperts
from unmask.models.lora.files import PREFIX, is_trained, read_adapter, stored_keys
from unmask.models.registry import family_of

# What a peft.LoraConfig may ask for beyond what this package writes: the value that means "no".
_PLAIN = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "layers_to_transform": None, "layer_replication": None,
    "trainable_token_indices": None, "alora_invocation_tokens": None, "megatron_config": None, "arrow_config": None,
    "kasa_config": None, "velora_config": None, "monteclora_config": None, "use_bdlora": None,
}  # fmt: skip
_STACKED_PLAIN = {"use_dora": False, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
# Types that PEFT relies on without a check.
_TYPES: dict[str, Any] = {
    "r": int, "lora_alpha": int | float, "lora_dropout": int | float, "bias": str, "rank_pattern": dict,
    "alpha_pattern": dict, "target_modules": str | list | None, "target_parameters": list | None,
    "init_lora_weights": bool | str,
}  # fmt: skip


def attach_adapter(model: nn.Module, config: Any) -> None:
    """Put fresh adapters of a peft.LoraConfig into a network in place and freeze everything else.

    Adapters and norms that are trained whole are fp32 whatever the base is in; other modules that are trained whole
    keep its dtype. `target_parameters` are full names of stacked experts.
    """
    _attach_experts(model, config)
    if config.target_modules:
        # PEFT shortens long lists in place, to suffixes that are unambiguous in this network only.
        linear_config = copy.deepcopy(config)
        linear_config.target_parameters = linear_config.modules_to_save = None
        inject_adapter_in_model(linear_config, model)
    for name in config.modules_to_save or []:
        _replace(model, name, ModulesToSaveWrapper(model.get_submodule(name), "default"))
    for name, parameter in model.named_parameters():
        trained = is_trained(name)
        parameter.requires_grad_(trained)
        if trained and (".lora_" in name or parameter.dim() == 1):
            parameter.data = parameter.data.float()
    if config.use_dora:
        restart_magnitudes(model)


def _attach_experts(model: nn.Module, config: Any) -> None:
    by_owner: dict[str, list[str]] = {}
    for name in config.target_parameters or []:
        owner, _, weight = name.rpartition(".")
        by_owner.setdefault(owner, []).append(weight)
    for owner, weights in by_owner.items():
        experts = model.get_submodule(owner)
        assert isinstance(experts, Experts)
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        ordered = [name for name, _ in experts.named_parameters() if name in weights]
        _replace(model, owner, AdaptedExperts(experts, ordered, config.r, scaling))


def restart_magnitudes(model: nn.Module) -> None:
    """Take the magnitudes of fresh DoRA adapters from the base as it is now, in fp32.

    PEFT took them in the base's dtype, and before a base is quantized; either would not be neutral.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_magnitude_vector["default"].update_layer(  # pyright: ignore[reportCallIssue]
                base_layer=module.get_base_layer(),
                lora_A=module.lora_A["default"].weight.data,
                lora_B=module.lora_B["default"].weight.data,
                scaling=module.scaling["default"],
            )


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Attach a saved adapter to a network.

    What it adapts is read from its tensors' names, so that suffixes and patterns of other tools' configurations cannot
    hit more here than they did there.

    Raises:
        ModelError: no adapter in the folder, a damaged one, one made for another network, or one that asks for what is
            not supported.
    """
    folder = find_adapter(folder)
    config = _read_config(folder)
    targets = family_of(model.config).lora
    _refuse_unsupported(folder, config)
    modules, parameters, whole = _adapted(model, targets, folder, config)
    exact = dataclasses.replace(
        config, target_modules=modules, target_parameters=parameters, modules_to_save=whole, exclude_modules=None
    )
    try:
        attach_adapter(model, exact)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"adapter: {folder} was made for another network ({reason[:200]})") from None
    read_adapter(model, folder)


def _read_config(folder: Path) -> Any:
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    if (peft_type := values.get("peft_type")) != "LORA":
        raise ModelError(f"adapter: {folder} is of peft_type {peft_type!r}; only LORA adapters can be applied")
    for name, kind in _TYPES.items():
        if name in values and (not isinstance(values[name], kind) or (kind is int and values[name] is True)):
            raise ModelError(f"{path}: {name} cannot be {values[name]!r}; copy the adapter again")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{path}: PEFT cannot read it ({reason[:200]}); copy the adapter again") from None


def _refuse_unsupported(folder: Path, config: Any) -> None:
    plain = _PLAIN | (_STACKED_PLAIN if config.target_parameters else {})
    for name, value in plain.items():
        if getattr(config, name, value) not in (value, None):
            where = " on stacked experts" if name in _STACKED_PLAIN else ""
            raise ModelError(f"adapter: {folder}: {name}={getattr(config, name)!r} is not supported{where}")


def _adapted(
    model: nn.Module, targets: LoraTargets, folder: Path, config: Any
) -> tuple[list[str], list[str], list[str] | None]:
    """Return our names of the linear layers, stacked matrices and whole modules that an adapter's tensors belong to."""
    modules: dict[str, None] = {}
    stacks: dict[str, int] = {}
    whole: dict[str, None] = {}
    for key in stored_keys(folder):
        name, lora, _ = targets.own_name(key).rpartition(".lora_")
        if not lora:
            name = targets.own_name(key).rpartition(".")[0]
        owner = re.sub(r"(\.base_layer)+$", "", name)
        _check_place(model, targets, folder, key, owner, bool(lora))
        if not lora:
            whole[name] = None
        elif isinstance(_find(model, owner), Experts):
            stacks[owner] = max(stacks.get(owner, 0), name.count(".base_layer") + 1)
        else:
            modules[name] = None
    _check_listed(folder, config, targets, list(modules))
    return list(modules), _stacked_names(model, targets, folder, config, stacks), list(whole) or None


def _check_place(model: nn.Module, targets: LoraTargets, folder: Path, key: str, owner: str, lora: bool) -> None:
    module = _find(model, owner)
    if module is None:
        raise ModelError(
            f"adapter: {folder} was made for another network (it adapts {PREFIX + key!r}, not in this one)"
        )
    allowed = targets.linears if lora else targets.whole
    if isinstance(module, Experts) or any(fnmatchcase(owner, pattern) for pattern in allowed):
        return
    reason = targets.why_frozen(owner) or "only linear layers of the network's layers can be adapted"
    raise ModelError(f"adapter: {folder} adapts {PREFIX + key!r}, but {reason}; train it without")


def _stacked_names(
    model: nn.Module, targets: LoraTargets, folder: Path, config: Any, stacks: dict[str, int]
) -> list[str]:
    """Return the full names of the adapted stacked matrices, which the tensors' names alone do not tell."""
    listed = [targets.own_name(name) for name in config.target_parameters or []]
    names = []
    for owner, depth in stacks.items():
        every = [f"{owner}.{weight}" for weight, _ in model.get_submodule(owner).named_parameters()]
        adapted = [name for name in every if _is_listed(name, listed)]
        if len(adapted) != depth:
            raise ModelError(
                f"adapter: {folder}: its tensors adapt {depth} matrices of {owner}, its target_parameters name "
                f"{len(adapted)}"
            )
        names += adapted
    return names


def _check_listed(folder: Path, config: Any, targets: LoraTargets, modules: list[str]) -> None:
    """Refuse a configuration that lists other modules than there are tensors of: one of the two files is foreign."""
    if not isinstance(config.target_modules, (list, set)):
        return  # a regular expression, which PEFT applies to names of a whole model
    listed = {targets.own_name(name) for name in config.target_modules}
    odd = [name for name in modules if not _is_listed(name, listed)]
    odd += sorted(name for name in listed if not any(_is_listed(module, [name]) for module in modules))
    if odd:
        raise ModelError(
            f"adapter: {folder} was made for another network or other layers: its tensors and its target_modules "
            f"disagree (first: {PREFIX + odd[0]})"
        )


def _is_listed(name: str, listed: Collection[str]) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for entry in listed)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Add every update to its weight and take the adapters out again, in place; the base is not quantized.

    Linear layers become W + s · B A (with DoRA scaled to its magnitudes), experts likewise, and modules that were
    trained whole replace the frozen ones. Sums are taken in fp32, a layer at a time, and rounded once to `dtype`, None
    being the base's own.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedExperts):
            _replace(model, name, module.merged(dtype))
        elif isinstance(module, ModulesToSaveWrapper):
            stored = next(module.original_module.parameters()).dtype
            _replace(model, name, module.modules_to_save["default"].to(dtype or stored))
        elif isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            stored = base.weight.dtype
            base.weight.data = base.weight.data.float()
            module.merge()  # pyright: ignore[reportCallIssue]
            base.weight.data = base.weight.data.to(dtype or stored)
            _replace(model, name, base)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
