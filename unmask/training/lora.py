"""Fresh LoRA adapters (Hu et al. 2021, arXiv 2106.09685): what of a network they adapt, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from unmask.config.model import PeftConfig
from unmask.errors import ConfigError
from unmask.models.experts import Experts
from unmask.models.family import LoraTargets
from unmask.models.lora.quantized import quantize_base
from unmask.models.registry import family_of


@dataclass(frozen=True)
class Targets:
    """Full names that a section's patterns mean: linear layers, stacked expert matrices, modules trained whole."""

    modules: list[str]
    parameters: list[str]
    whole: list[str]


def resolve_targets(section: PeftConfig, model: nn.Module) -> Targets:
    """Find what the section's patterns mean in a network.

    Raises:
        ConfigError: a pattern that matches nothing, or only what cannot be adapted (head, embedding, router); the
            message lists what can.
    """
    lora, head = family_of(model.config).lora, cast(Any, model.head)
    modules = target_names(section, model)
    stacks = [
        f"{owner}.{name}"
        for owner, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    ]
    parameters = _match("target_parameters", section.target_parameters or [], stacks, stacks, model, lora)
    wholes = [
        name
        for name, module in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in lora.whole)
        and next(module.parameters(), None) is not None
        and not (isinstance(module, nn.Embedding) and module.weight is head.weight)  # tied: it is also the head
    ]
    whole = _match("modules_to_save", section.modules_to_save or [], wholes, wholes, model, lora)
    return Targets(modules, parameters, whole)


def target_names(section: PeftConfig, model: nn.Module) -> list[str]:
    """Return the full names of the linear layers that the section's patterns match.

    A pattern is matched against the whole module path. A head is left out even where a pattern spells its name: the
    loss never calls it as a module.

    Raises:
        ConfigError: a pattern that matches no linear layer that can be adapted.
    """
    lora = family_of(model.config).lora
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in lora.linears)
    ]
    if section.target_modules is None:
        chosen = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in lora.default)]
    else:
        chosen = _match("target_modules", section.target_modules, linears, linears, model, lora)
    excluded = section.exclude_modules or []
    _match("exclude_modules", excluded, chosen, linears, model, lora)
    names = [name for name in chosen if not any(_matches(name, pattern) for pattern in excluded)]
    if chosen and not names:
        raise ConfigError(f"peft.exclude_modules: {excluded} leaves no linear layer to adapt; exclude fewer")
    return names


def _matches(name: str, pattern: str) -> bool:
    """Say whether a glob means a full name; a name's last parts alone are enough, as in PEFT."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


_MATCHED = {
    "target_modules": "linear layer that can be adapted",
    "exclude_modules": "linear layer that target_modules takes",
    "target_parameters": "stack of experts",
    "modules_to_save": "module that can be trained whole",
}


def _match(
    field: str, patterns: list[str], names: list[str], listed: list[str], model: nn.Module, lora: LoraTargets
) -> list[str]:
    """Return the names that the patterns match, in their order; ConfigError for a pattern without any."""
    matched: list[str] = []
    parts = 2 if field == "target_parameters" else 1
    for pattern in patterns:
        hits = [name for name in names if _matches(name, pattern)]
        if not hits:
            others = [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]
            named = next((name for name in others if name and _matches(name, pattern)), None)
            reason = lora.why_frozen(named or pattern)
            why = "" if reason is None else f" ({reason})"
            choices = ", ".join(sorted({"*." + ".".join(name.rsplit(".", 2)[-parts:]) for name in listed}))
            raise ConfigError(
                f"peft.{field}: {pattern!r} matches no {_MATCHED[field]}{why}; "
                + (f"there are {choices}" if choices else "this model has none")
            )
        matched += hits
    return list(dict.fromkeys(matched))


def attach(model: nn.Module, section: PeftConfig, base: str) -> Any:
    """Attach fresh adapters and freeze the rest, in place; return the peft.LoraConfig that belongs into their folder.

    On the meta device, DoRA's magnitudes are to be taken from the base when it is there (`restart_magnitudes`).
    `base` is the name or folder of the base model, recorded in adapter_config.json.
    """
    from peft import LoraConfig  # takes seconds, and only adapters need it

    from unmask.models.lora.attach import attach_adapter, restart_magnitudes

    targets = resolve_targets(section, model)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=section.lora_dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        modules_to_save=targets.whole or None,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        base_model_name_or_path=base,
    )
    attach_adapter(model, config)
    if section.load_in_4bit:
        quantize_base(model)
        if section.use_dora and not next(model.parameters()).is_meta:
            restart_magnitudes(model)
    return config
