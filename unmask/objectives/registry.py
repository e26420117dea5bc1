"""The `dllm` section and the table of objectives. Needs no torch until an objective is built."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from unmask.batch import rounded_up
from unmask.errors import ConfigError, FieldError
from unmask.sections import choice_problem

if TYPE_CHECKING:
    from unmask.batch import Batch, Corrupted, LossTerms, TokenLosses
    from unmask.rng import NoiseStream


class Objective(Protocol):
    """What the training loop needs of an objective."""

    def corrupt(self, batch: Batch, rng: NoiseStream) -> Corrupted:
        """Return the corrupted batch; pure, on the CPU, with its terms' counts."""
        ...

    def loss(self, model: Any, noisy: Any, counts: Mapping[str, float] | None = None) -> LossTerms:
        """Run the network, as often as the objective needs; each term is divided by its count of the global batch.

        Args:
            model: the network.
            noisy: what `corrupt` returned, on the network's device.
            counts: each term's count over all micro-batches and ranks; None = this micro-batch is the whole.
        """
        ...

    def token_losses(self, model: Any, noisy: Any) -> Mapping[str, TokenLosses]:
        """Return each term of `loss` position by position, from the same calls of the network; without gradient."""
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
        defaults: the fields of the `dllm` section that belong to this objective, with their defaults; any other is
            refused.
        options: those of them that the class takes.
        from_model: argument of the class → attribute of the model's configuration that it is read from.
        fills: attribute of the model's configuration: rows may grow to a multiple of it; None = they stay as they are.
    """

    module: str
    class_name: str
    noise: str
    attention: str
    defaults: Mapping[str, Any]
    options: tuple[str, ...]
    from_model: Mapping[str, str]
    fills: str | None = None


# dllm.mode → its objective. A new objective is a file and an entry here.
OBJECTIVES: dict[str, ObjectiveEntry] = {
    "mdlm": ObjectiveEntry(
        "unmask.objectives.mdlm",
        "MDLM",
        noise="mask",
        attention="bidirectional",
        defaults={
            "eps": 1e-3,
            "mask_token_id": None,
            "supervise_padding": False,
            "normalization": "token",
            "time_sampling": "iid",
        },
        options=("eps", "normalization", "time_sampling"),
        from_model={"mask_token_id": "mask_token_id"},
    ),
    "block_diffusion": ObjectiveEntry(
        "unmask.objectives.block_diffusion",
        "BlockDiffusion",
        noise="uniform",
        attention="canvas",
        defaults={
            "eps": 1e-3,
            "block_size": None,
            "vocab_size": None,
            "encoder_loss_weight": 1.0,
            "self_conditioning_p": 0.5,
            "freeze_router": True,
            "stop_gradient_to_encoder": False,
            "time_sampling": "iid",
        },
        options=("eps", "encoder_loss_weight", "self_conditioning_p", "stop_gradient_to_encoder", "time_sampling"),
        from_model={"block_size": "canvas_length", "vocab_size": "vocab_size", "eos_token_id": "eos_token_id"},
        fills="canvas_length",
    ),
}


@dataclass(frozen=True)
class DllmConfig:
    """Section `dllm`: the objective. A field that the chosen objective has no use for is refused.

    Attributes:
        mode: name of the objective, `mdlm` or `block_diffusion`.
        eps: smallest corruption level, in (0, 1); default 0.001.
        time_sampling: `iid` (default) or `stratified` over the global batch.
        mask_token_id: mdlm; checked against the model, which knows it; may be left out.
        supervise_padding: mdlm; pad rows with EOS that is attended, corrupted and supervised, which teaches the model
            to stop; default false. In block diffusion the rest of an answer's last canvas always is.
        normalization: mdlm; `token` (default) or `sequence`, see `unmask.objectives.mdlm`.
        block_size: block_diffusion; checked against the model's canvas_length; may be left out.
        vocab_size: block_diffusion; checked against the model; may be left out.
        encoder_loss_weight: block_diffusion; weight of the encoder's next-token loss, at least 0; default 1.
        self_conditioning_p: block_diffusion; share of examples that see their own first prediction; default 0.5.
        freeze_router: block_diffusion; the router's projection and scale are not trained; default true.
        stop_gradient_to_encoder: block_diffusion; the denoising loss does not train the encoder's keys and values;
            default false.
    """

    mode: str = "mdlm"
    eps: float | None = None
    time_sampling: Literal["iid", "stratified"] | None = None
    mask_token_id: int | None = None
    supervise_padding: bool | None = None
    normalization: Literal["token", "sequence"] | None = None
    block_size: int | None = None
    vocab_size: int | None = None
    encoder_loss_weight: float | None = None
    self_conditioning_p: float | None = None
    freeze_router: bool | None = None
    stop_gradient_to_encoder: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in OBJECTIVES:
            raise FieldError("mode", choice_problem(self.mode, OBJECTIVES))
        defaults = OBJECTIVES[self.mode].defaults
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "mode":
                continue
            if item.name not in defaults and value is not None:
                raise FieldError(
                    item.name, f"{value!r} has no meaning for mode {self.mode}; leave it out ({_of_mode(item.name)})"
                )
            if value is None:
                object.__setattr__(self, item.name, defaults.get(item.name))
        self._check_ranges()

    def _check_ranges(self) -> None:
        if self.eps is None or not 0 < self.eps < 1:
            raise FieldError("eps", f"must lie between 0 and 1, got {self.eps}")
        if self.mask_token_id is not None and self.mask_token_id < 0:
            raise FieldError("mask_token_id", f"must not be negative, got {self.mask_token_id}")
        if self.encoder_loss_weight is not None and not 0 <= self.encoder_loss_weight < math.inf:
            raise FieldError("encoder_loss_weight", f"must be at least 0, got {self.encoder_loss_weight}")
        if self.self_conditioning_p is not None and not 0 <= self.self_conditioning_p <= 1:
            raise FieldError("self_conditioning_p", f"must lie in [0, 1], got {self.self_conditioning_p}")


# How a message calls what a model family lacks.
_NOISES = {"mask": "mask token", "uniform": "noise drawn from the vocabulary"}


def _of_mode(name: str) -> str:
    modes = [mode for mode, entry in OBJECTIVES.items() if name in entry.defaults]
    return f"it belongs to {', '.join(modes)}"


def check_against_model(section: DllmConfig, family: Any, model_config: Any) -> None:
    """Refuse an objective for another noise or attention than the model's, or a field that contradicts the model.

    Args:
        section: the `dllm` section.
        family: the model's `Family`.
        model_config: its parsed configuration.

    Raises:
        ConfigError: naming the field, both values and the remedy.
    """
    entry = OBJECTIVES[section.mode]
    if (family.noise, family.attention) != (entry.noise, entry.attention):
        if entry.noise != family.noise:
            lacks = _NOISES[entry.noise]
        else:
            lacks = f"{entry.attention} attention"
        modes = [mode for mode, o in OBJECTIVES.items() if (o.noise, o.attention) == (family.noise, family.attention)]
        remedy = f"use dllm.mode: {' or '.join(modes)}" if modes else "no objective trains it"
        raise ConfigError(f"dllm.mode: {section.mode}: {family.model_type} has no {lacks}; {remedy}")
    if section.mask_token_id is not None and section.mask_token_id >= model_config.rows:
        raise ConfigError(
            f"dllm.mask_token_id: {section.mask_token_id} is outside the model's vocabulary of {model_config.rows}; "
            f"the model says {model_config.mask_token_id}, leave the field out to use it"
        )
    for name, known_as in OBJECTIVES[section.mode].from_model.items():
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
