"""The table of objectives: what each needs of a model, and how it is built. Needs no torch until one is built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from unmask.config.data import rounded_up
from unmask.config.objective import DllmConfig
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.batch import Batch, Corrupted, LossTerms, TokenLosses, Work
    from unmask.rng import NoiseStream


class Objective(Protocol):
    """What the training loop needs of an objective."""

    def corrupt(self, batch: Batch, rng: NoiseStream) -> Corrupted:
        """Return the corrupted batch; pure, on the CPU, with its terms' counts."""
        ...

    def loss(self, model: Any, noisy: Any, counts: Mapping[str, float] | None = None) -> LossTerms:
        """Run the network, as often as the objective needs; each term is divided by its count of the global batch.

        Args:
            noisy: what `corrupt` returned, on the network's device.
            counts: each term's count over all micro-batches and ranks; None = this micro-batch is the whole.
        """
        ...

    def token_losses(self, model: Any, noisy: Any) -> Mapping[str, TokenLosses]:
        """Return each term of `loss` position by position, from the same calls of the network; without gradient."""
        ...

    def work(self, noisy: Any) -> Work:
        """Return the sizes of what `loss` computes."""
        ...

    def shown(self, noisy: Any, row: int) -> Shown:
        """Return what became of one row, for a person to look at."""
        ...


@dataclass(frozen=True)
class Shown:
    """One row as the network sees it.

    Attributes:
        what: a sentence on what was done to it.
        ids: token ids.
        hidden: for each, whether its token is hidden behind a mask.
        changed: for each, whether it was replaced by another token.
    """

    what: str
    ids: list[int]
    hidden: list[bool]
    changed: list[bool]


@dataclass(frozen=True)
class ObjectiveEntry:
    """One row of the table.

    Attributes:
        module: where `class_name` lives.
        class_name: a frozen dataclass that implements `Objective`.
        noise, attention: those of the model families that it trains.
        options: the fields of the `dllm` section (`unmask.config.objective.MODES`) that the class takes.
        from_model: argument of the class → attribute of the model's configuration that it is read from.
        fills: attribute of the model's configuration: rows may grow to a multiple of it; None = they stay as they are.
    """

    module: str
    class_name: str
    noise: str
    attention: str
    options: tuple[str, ...]
    from_model: Mapping[str, str]
    fills: str | None = None


# dllm.mode → its objective. A new objective is a file, an entry here and one in `unmask.config.objective.MODES`.
OBJECTIVES: dict[str, ObjectiveEntry] = {
    "mdlm": ObjectiveEntry(
        "unmask.objectives.mdlm",
        "MDLM",
        noise="mask",
        attention="bidirectional",
        options=("eps", "normalization", "time_sampling"),
        from_model={"mask_token_id": "mask_token_id"},
    ),
    "block_diffusion": ObjectiveEntry(
        "unmask.objectives.canvas",
        "CanvasDiffusion",
        noise="uniform",
        attention="canvas",
        options=("eps", "encoder_loss_weight", "self_conditioning_p", "stop_gradient_to_encoder", "time_sampling"),
        from_model={"block_size": "canvas_length", "vocab_size": "vocab_size", "eos_token_id": "eos_token_id"},
        fills="canvas_length",
    ),
}


def check_against_model(section: DllmConfig, family: Any, model_config: Any) -> None:
    """Refuse an objective for another noise or attention than the model's, or a field that contradicts the model.

    Raises:
        ConfigError: naming the field, both values and the remedy.
    """
    entry = OBJECTIVES[section.mode]
    if (family.noise, family.attention) != (entry.noise, entry.attention):
        other_noise = entry.noise != family.noise
        lacks = f"is not trained with {entry.noise} noise" if other_noise else f"has no {entry.attention} attention"
        modes = [mode for mode, o in OBJECTIVES.items() if (o.noise, o.attention) == (family.noise, family.attention)]
        remedy = f"use dllm.mode: {' or '.join(modes)}" if modes else "no objective trains it"
        raise ConfigError(f"dllm.mode: {section.mode}: {family.model_type} {lacks}; {remedy}")
    if section.mask_token_id is not None and section.mask_token_id >= model_config.rows:
        raise ConfigError(
            f"dllm.mask_token_id: {section.mask_token_id} is outside the model's vocabulary of {model_config.rows}; "
            f"the model says {model_config.mask_token_id}, leave the field out to use it"
        )
    for name, known_as in entry.from_model.items():
        value, known = getattr(section, name, None), getattr(model_config, known_as)
        if value is not None and value != known:
            raise ConfigError(
                f"dllm.{name}: {value} contradicts the model's config.json, which says {known_as} {known}; "
                "leave the field out to use the model's"
            )


def most_padding(section: DllmConfig, model_config: Any) -> int:
    """Return how many positions the objective may add to a row, which the model must have beyond `seq_length`."""
    fills = OBJECTIVES[section.mode].fills
    return 0 if fills is None else rounded_up(getattr(model_config, fills))


def build_objective(section: DllmConfig, model_config: Any) -> Objective:
    """Build the objective for a model; what the model knows (mask token, canvas) is read from its configuration."""
    entry = OBJECTIVES[section.mode]
    known = {name: getattr(model_config, known_as) for name, known_as in entry.from_model.items()}
    options = {name: getattr(section, name) for name in entry.options}
    return getattr(importlib.import_module(entry.module), entry.class_name)(**known, **options)
