"""LoRA adapters (PEFT's modules, and ours on stacked experts): attach to a network, load, merge into its weights.

PEFT takes seconds to import: modules that do not always need it import this one where they do.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from unmask.errors import ModelError
from unmask.models.experts import Experts
from unmask.models.family import LoraTargets
from unmask.models.folders import ADAPTER_CONFIG, find_adapter
from unmask.models.lora.adapter_config import AdapterConfig, rank_and_alpha, read_adapter_config, valid_patterns
from unmask.models.lora.experts import AdaptedExperts
from unmask.models.lora.files import PREFIX, highest_rank, is_trained, read_adapter, stored_keys
from unmask.models.registry import family_of


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
        for patterns in (linear_config.rank_pattern, linear_config.alpha_pattern):
            for name in config.target_parameters or []:  # of which PEFT would say that they match nothing
                patterns.pop(re.escape(name), None)
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
        sizes = {rank_and_alpha(config, f"{owner}.{weight}") for weight in weights}
        if len(sizes) > 1:
            raise ModelError(
                f"adapter: the matrices of {owner} have ranks or alphas of their own, which is not supported"
            )
        rank, alpha = sizes.pop()
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        ordered = [name for name, _ in experts.named_parameters() if name in weights]
        _replace(model, owner, AdaptedExperts(experts, ordered, rank, scaling))


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

    What it adapts is read from its tensors' names; adapter_config.json must say the same of this network.

    Raises:
        ModelError: no adapter in the folder, a damaged one, one made for another network, or one that asks for what is
            not supported.
    """
    folder = find_adapter(folder)
    config = read_adapter_config(folder)
    if config.changes_base and any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"adapter: {folder} takes its start ({config.init_lora_weights}) out of whole matrices of the base, which "
            "several processes share; use one process, or merge it first with `unmask export`"
        )
    targets = family_of(model.config).lora
    with valid_patterns(folder):
        modules, parameters, whole = _adapted(model, targets, folder, config)
        ranks, alphas = _sizes(targets, folder, config, [*modules, *parameters])
    if parameters and config.use_dora:
        raise ModelError(f"adapter: {folder}: use_dora is not supported on stacked experts; train it without")
    exact = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,  # pyright: ignore[reportArgumentType]
        target_modules=modules,
        target_parameters=parameters,
        modules_to_save=whole,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    try:
        attach_adapter(model, exact)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"adapter: {folder} was made for another network ({reason[:200]})") from None
    read_adapter(model, folder)


def _sizes(
    targets: LoraTargets, folder: Path, config: AdapterConfig, names: list[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the patterns of our full names whose rank, and whose alpha, is not the adapter's."""
    ranks, alphas = {}, {}
    most = highest_rank(folder)
    for name in names:
        sizes = {rank_and_alpha(config, theirs) for theirs in targets.reference_names(name)}
        if len(sizes) > 1:
            raise ModelError(
                f"adapter: {folder}: rank_pattern or alpha_pattern tells apart "
                f"{' and '.join(targets.reference_names(name))}, and both are of one weight here; it cannot be "
                "applied to the shared weight"
            )
        rank, alpha = sizes.pop()
        if rank > most:  # before memory is taken for it
            raise ModelError(
                f"adapter: {folder}: {ADAPTER_CONFIG} gives {PREFIX + name} rank {str(rank)[:20]}, and no tensor has "
                f"more than {most} rows; one of the two files is of another adapter"
            )
        if rank != config.r:
            ranks[re.escape(name)] = rank
        if alpha != config.lora_alpha:
            alphas[re.escape(name)] = alpha
    return ranks, alphas


def _adapted(
    model: nn.Module, targets: LoraTargets, folder: Path, config: AdapterConfig
) -> tuple[list[str], list[str], list[str] | None]:
    """Return our names of the linear layers, stacked matrices and whole modules that an adapter's tensors belong to."""
    modules: dict[str, None] = {}
    stacks: dict[str, int] = {}
    whole: dict[str, None] = {}
    theirs: set[str] = set()  # the reference class's names of what has tensors
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
        theirs.add(key.rpartition(".lora_" if lora else ".")[0])
    _check_listed(model, targets, folder, config, theirs)
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
    if key.endswith(".bias"):
        reason = "biases stay frozen (bias: none)"
    raise ModelError(f"adapter: {folder} adapts {PREFIX + key!r}, but {reason}; train it without")


def _stacked_names(
    model: nn.Module, targets: LoraTargets, folder: Path, config: AdapterConfig, stacks: dict[str, int]
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


def _check_listed(
    model: nn.Module, targets: LoraTargets, folder: Path, config: AdapterConfig, stored: set[str]
) -> None:
    """Refuse a configuration by which PEFT would adapt other layers than there are tensors of: one file is foreign.

    Names that no module of this network has are no matter.
    """
    named = {theirs for name, _ in model.named_modules() for theirs in targets.reference_names(name)}
    odd: list[str] = []
    if config.target_modules is not None:  # else PEFT has a list for the class
        adaptable = {
            theirs
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in targets.linears)
            for theirs in targets.reference_names(name)
        }
        odd += sorted(stored & adaptable ^ {name for name in adaptable if config.adapts(name)})
    for ending in config.modules_to_save or []:  # PEFT takes the ends of names
        if not any(name.endswith(ending) for name in stored):
            odd += sorted(name for name in named if name.endswith(ending))[:1]
    if odd:
        raise ModelError(
            f"adapter: {folder} was made for another network or other layers: its tensors and its {ADAPTER_CONFIG} "
            f"disagree (first: {PREFIX + odd[0]} is in one of them alone)"
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
