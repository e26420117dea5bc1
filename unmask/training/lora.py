"""The `peft` section: low-rank adapters on the blocks' linear layers (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from unmask.errors import ConfigError, FieldError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class PeftConfig:
    """Section `peft`: train an adapter instead of the model. Names are those of PEFT's LoraConfig.

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        target_modules: patterns over full module names (`*` matches anything), for example `*.q_proj`; None takes
            every linear layer of the blocks. The language-model head is never adapted by a pattern.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise FieldError("r", f"must be at least 1, got {self.r}")
        if self.lora_alpha <= 0:
            raise FieldError("lora_alpha", f"must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise FieldError("lora_dropout", f"must lie in [0, 1), got {self.lora_dropout}")


def target_names(section: PeftConfig, model: nn.Module) -> list[str]:
    """Return the full names of the linear layers that the section's patterns match.

    A pattern is matched against the whole module path. The head is left out although `*.ff_out` spells it: its name is
    also that of each block's down projection, and the loss never calls it as a module.

    Raises:
        ConfigError: a pattern that matches no linear layer of a block.
    """
    from torch import nn as torch_nn

    linears = [
        name for name, module in model.named_modules() if isinstance(module, torch_nn.Linear) and ".blocks." in name
    ]
    if section.target_modules is None:
        return linears
    found: list[str] = []
    for pattern in section.target_modules:
        matches = [name for name in linears if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        if not matches:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ConfigError(
                f"peft.target_modules: {pattern!r} matches no linear layer of a block; layers are named "
                f"{', '.join('*.' + kind for kind in kinds)}"
            )
        found += matches
    return list(dict.fromkeys(found))


def attach(model: nn.Module, section: PeftConfig, base: str) -> Any:
    """Attach fresh adapters and freeze the rest; return the peft.LoraConfig that belongs into the adapter's folder.

    Args:
        model: the network, changed in place.
        section: the `peft` section.
        base: name or folder of the base model, recorded in adapter_config.json.
    """
    from peft import LoraConfig

    from unmask.models.adapter import attach_adapter

    config = LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=section.lora_dropout,
        target_modules=target_names(section, model),
        base_model_name_or_path=base,
    )
    attach_adapter(model, config)
    return config
