"""The `dllm` section and the table of objectives. Needs no torch until an objective is built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from unmask.errors import ConfigError, FieldError
from unmask.sections import choice_problem

if TYPE_CHECKING:
    from unmask.batch import Batch, LossTerms, NoisyBatch
    from unmask.rng import NoiseStream


class Objective(Protocol):
    """What the training loop needs of an objective."""

    def corrupt(self, batch: Batch, rng: NoiseStream) -> NoisyBatch:
        """Return the noisy batch; pure, on the CPU, with its terms' counts."""
        ...

    def loss(self, model: Any, noisy: NoisyBatch) -> LossTerms:
        """Run the network, as often as the objective needs, and return sums and counts."""
        ...


@dataclass(frozen=True)
class ObjectiveEntry:
    """One row of the table.

    Attributes:
        module: where `class_name` lives.
        class_name: a frozen dataclass that implements `Objective`.
        needs: what a model family must provide.
        options: fields of the `dllm` section that the class takes.
    """

    module: str
    class_name: str
    needs: frozenset[str]
    options: tuple[str, ...] = field(default=())


# dllm.mode → its objective. A new objective is a file and an entry here.
OBJECTIVES: dict[str, ObjectiveEntry] = {
    "mdlm": ObjectiveEntry(
        "unmask.objectives.mdlm", "MDLM", frozenset({"mask_token"}), ("eps", "normalization", "time_sampling")
    ),
}


@dataclass(frozen=True)
class DllmConfig:
    """Section `dllm`: the objective.

    Attributes:
        mode: name of the objective.
        mask_token_id: checked against the model, which knows it; may be left out.
        eps: smallest corruption level, in (0, 1).
        supervise_padding: pad rows with EOS that is attended, corrupted and supervised; teaches the model to stop.
        normalization: `token` or `sequence`, see `unmask.objectives.mdlm`.
        time_sampling: `iid` or `stratified` over the global batch.
    """

    mode: str = "mdlm"
    mask_token_id: int | None = None
    eps: float = 1e-3
    supervise_padding: bool = False
    normalization: Literal["token", "sequence"] = "token"
    time_sampling: Literal["iid", "stratified"] = "iid"

    def __post_init__(self) -> None:
        if self.mode not in OBJECTIVES:
            raise FieldError("mode", choice_problem(self.mode, OBJECTIVES))
        if not 0 < self.eps < 1:
            raise FieldError("eps", f"must lie between 0 and 1, got {self.eps}")
        if self.mask_token_id is not None and self.mask_token_id < 0:
            raise FieldError("mask_token_id", f"must not be negative, got {self.mask_token_id}")


def check_against_model(section: DllmConfig, provides: frozenset[str], model_type: str, model_config: Any) -> None:
    """Refuse an objective that the model cannot serve, or a field that contradicts the model. Needs no torch.

    Raises:
        ConfigError: naming the field, both values and the remedy.
    """
    missing = OBJECTIVES[section.mode].needs - provides
    if missing:
        raise ConfigError(f"dllm.mode: {section.mode} needs {', '.join(sorted(missing))}, which {model_type} has not")
    known = getattr(model_config, "mask_token_id", None)
    if section.mask_token_id is None or section.mask_token_id == known:
        return
    if section.mask_token_id >= model_config.rows:
        raise ConfigError(
            f"dllm.mask_token_id: {section.mask_token_id} is outside the model's vocabulary of {model_config.rows}; "
            f"the model says {known}, leave the field out to use it"
        )
    raise ConfigError(
        f"dllm.mask_token_id: {section.mask_token_id} contradicts the model's config.json, which says {known}; "
        "leave the field out to use the model's"
    )


def build_objective(section: DllmConfig, model_config: Any) -> Objective:
    """Build the objective for a model; what the model knows (the mask token) is read from its configuration."""
    entry = OBJECTIVES[section.mode]
    from_model: Mapping[str, Any] = {"mask_token_id": model_config.mask_token_id}
    options = {name: getattr(section, name) for name in entry.options}
    return getattr(importlib.import_module(entry.module), entry.class_name)(**from_model, **options)
