"""What a run measures, keeps and passes on: `validation`, `checkpoint`, `wandb`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from unmask.config.sampler import SamplerConfig
from unmask.errors import FieldError, SamplingError, choice_problem

# checkpoint.best_metric → the section without which nothing measures it.
METRICS = {"validation_loss": "validation_dataset", "exact_match": "validation"}


@dataclass(frozen=True)
class ValidationConfig:
    """Section `validation`: answer rows of `validation_dataset` during training and count the right ones.

    Attributes:
        generate_every_steps: how often, in optimizer steps, and at the end; null = at the end only
        max_samples: answer the first rows only; null answers all
        batch_size: rows denoised together; null is 16
        grader: what is compared with the row's answer: the number after `####` or the last one, the whole text, or an
            expression (math-verify)
        sampler: settings of the sampler by name, such as `steps: 64`, as the flags of `unmask generate`; what is not
            there is the model's own
        keep_samples: answers, to the first rows, written to `samples.jsonl` each time with how they were denoised
    """

    generate_every_steps: int | None = None
    max_samples: int | None = 64
    batch_size: int | None = None
    grader: Literal["number", "text", "expression"] = "number"
    sampler: dict[str, Any] | None = None
    keep_samples: int = 4

    def __post_init__(self) -> None:
        for name in ("generate_every_steps", "max_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FieldError(name, f"must be at least 1, or null, got {value}")
        if self.keep_samples < 0:
            raise FieldError("keep_samples", f"must not be negative, got {self.keep_samples}")
        known = [field.name for field in fields(SamplerConfig)]
        for name in self.sampler or {}:
            if name not in known:
                raise FieldError("sampler", choice_problem(name, known))
        try:
            self.settings()
        except SamplingError as error:
            raise FieldError("sampler", str(error)) from None

    def settings(self) -> SamplerConfig:
        """Return the sampler's settings."""
        return SamplerConfig(**(self.sampler or {}))


@dataclass(frozen=True)
class CheckpointConfig:
    """Section `checkpoint`: the run directory and what is kept in it.

    Attributes:
        enabled: false writes logs only and cannot resume
        checkpoint_dir: the run directory; a run that finds checkpoints there goes on from the newest whole one
        max_recent_checkpoints: older ones are removed after each save, the best one aside; null keeps all
        save_consolidated: with several processes, which checkpoints hold their weights as a plain Hugging Face folder
            instead of a file from each process: none (false), the one at the run's end (`final`) or all (`every`,
            true); one process writes nothing else
        best_metric: `validation_loss` (least) or `exact_match` (most): the checkpoint of the best evaluation by it is
            saved, kept, and linked as `best`; null compares nothing
        accept_changed_data: resume although rows that were trained on have changed since; rows to come may change
            without it
    """

    enabled: bool = True
    checkpoint_dir: str = "checkpoints"
    max_recent_checkpoints: int | None = 3
    save_consolidated: bool | Literal["final", "every"] = "final"
    best_metric: str | None = None
    accept_changed_data: bool = False

    def __post_init__(self) -> None:
        if self.best_metric is not None and self.best_metric not in METRICS:
            raise FieldError("best_metric", choice_problem(self.best_metric, METRICS))
        if self.best_metric is not None and not self.enabled:
            raise FieldError("best_metric", "keeps a checkpoint, and enabled is false; set it to null")
        if self.save_consolidated is True:
            object.__setattr__(self, "save_consolidated", "every")
        if self.max_recent_checkpoints is not None and self.max_recent_checkpoints < 1:
            raise FieldError("max_recent_checkpoints", f"must be at least 1 or null, got {self.max_recent_checkpoints}")


@dataclass(frozen=True)
class WandbConfig:
    """Section `wandb`: where and under which name a run is tracked.

    Attributes:
        enable: false leaves tracking off
        tracker: tensorboard writes into the run directory
        project: project name (wandb, trackio)
        name: run name (wandb, trackio); null lets the tracker choose
        entity: wandb team or user
        mode: wandb's own
    """

    enable: bool = True
    tracker: Literal["wandb", "tensorboard", "trackio"] = "wandb"
    project: str = "unmask"
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
