"""What an adapter may touch of each family's network, and under which names the reference class knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class AdapterLayout:
    """The adaptable part of a network. Patterns are globs over full module names.

    Attributes:
        linears: linear layers that a low-rank update may be added to.
        default: those of them that are adapted when nothing is said.
        whole: modules that may be trained whole beside the adapter (`modules_to_save`).
        frozen: a part of a module's name → why nothing of that name can be adapted.
        roles: (prefix here, prefix there): names under which the reference class has the same weight once more.
    """

    linears: tuple[str, ...]
    default: tuple[str, ...]
    whole: tuple[str, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[tuple[str, str], ...] = ()

    def reference_names(self, name: str) -> list[str]:
        """Return every name that the reference class has for a module or parameter of ours, ours first."""
        twins = [there + name.removeprefix(here) for here, there in self.roles if name.startswith(here)]
        return [name, *twins]

    def own_name(self, name: str) -> str:
        """Return our name of a module or parameter of the reference class."""
        for here, there in self.roles:
            if name.startswith(there):
                return here + name.removeprefix(there)
        return name

    def why_frozen(self, text: str) -> str | None:
        """Return why the module (or pattern) of that name cannot be adapted; None when no reason is listed."""
        return next((reason for word, reason in self.frozen.items() if word in text), None)


# By the name of the configuration's class. A family without a line here cannot be adapted.
LAYOUTS: dict[str, AdapterLayout] = {
    "LLaDAConfig": AdapterLayout(
        linears=("model.transformer.blocks.*",),
        default=("model.transformer.blocks.*",),
        whole=("*norm", "model.transformer.ln_f", "model.transformer.wte", "model.transformer.ff_out"),
        frozen={
            "transformer.ff_out": "the head is read as a matrix by the loss; peft.modules_to_save can train it whole",
            "wte": "the embedding is a lookup; peft.modules_to_save can train it whole",
        },
    ),
    "DiffusionGemmaConfig": AdapterLayout(
        linears=(
            "model.decoder.layers.*.self_attn.*",
            "model.decoder.layers.*.mlp.*",
            "model.decoder.self_conditioning.*",
        ),
        default=("model.decoder.layers.*.self_attn.*", "model.decoder.layers.*.mlp.*"),
        whole=("*norm", "*layernorm*"),
        frozen={
            "router": "the router stays frozen, or the choice of experts would drift",
            "experts": "experts are stacked matrices; name them in peft.target_parameters",
            "embed_tokens": "the embedding is also the head and the self-conditioning signal",
            "lm_head": "the head is the embedding, which stays frozen",
            "vision": "the vision tower takes no part in training on text",
        },
        roles=(
            ("model.decoder.layers.", "model.encoder.language_model.layers."),
            ("model.decoder.norm", "model.encoder.language_model.norm"),
        ),
    ),
}


def layout_of(model: nn.Module) -> AdapterLayout:
    """Return the layout of a network, by its configuration's class."""
    return LAYOUTS[type(model.config).__name__]


def matches(name: str, pattern: str) -> bool:
    """Say whether a glob means a full name; a name's last parts alone are enough, as in PEFT."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
