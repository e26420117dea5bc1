"""How long a run is, what happens when, and the learning rate of each step. Pure arithmetic, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unmask.errors import FieldError


@dataclass(frozen=True)
class StepSchedulerConfig:
    """Section `step_scheduler`: sizes and intervals, in rows and optimizer steps.

    Attributes:
        global_batch_size: rows of one optimizer step, over all micro-batches.
        local_batch_size: rows of one forward pass.
        max_steps: stop after this many steps; None = by epochs alone.
        num_epochs: stop after this many epochs; None = by steps alone. An epoch is counted in the rows that the source
            offers. Rows that turn out unusable are left out, which makes a pass shorter, so that a run may look at the
            rest more often than this; `max_steps` is exact.
        ckpt_every_steps: save a checkpoint every so many steps (and at the end); None = at the end only.
        val_every_steps: run validation every so many steps (and at the end); None = at the end only.
        val_at_start: run validation before the first step too, as step 0.
    """

    global_batch_size: int = 32
    local_batch_size: int = 4
    max_steps: int | None = None
    num_epochs: int | None = None
    ckpt_every_steps: int | None = None
    val_every_steps: int | None = None
    val_at_start: bool = False

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "local_batch_size", "max_steps", "num_epochs", "ckpt_every_steps"):
            _at_least_one(name, getattr(self, name))
        _at_least_one("val_every_steps", self.val_every_steps)
        if self.max_steps is None and self.num_epochs is None:
            raise FieldError("max_steps", "set max_steps, num_epochs or both, so that the run has an end")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the run's length: the smaller of `max_steps` and `num_epochs` passes."""
        limits = [self.max_steps, None if self.num_epochs is None else self.num_epochs * steps_per_epoch]
        return min(limit for limit in limits if limit is not None)


@dataclass(frozen=True)
class LRSchedulerConfig:
    """Section `lr_scheduler`: the learning rate over the run.

    Attributes:
        lr_decay_style: `constant`, `linear` or `cosine` from the optimizer's lr to `min_lr`.
        lr_warmup_steps: steps of linear warm-up from `init_lr`; None = a tenth of the run, at most 1000.
        init_lr: rate before the first warm-up step.
        min_lr: rate after `lr_decay_steps`.
        lr_decay_steps: step at which `min_lr` is reached; None = the end of the run.
    """

    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int | None = 0
    init_lr: float = 0.0
    min_lr: float = 0.0
    lr_decay_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("lr_warmup_steps", "init_lr", "min_lr"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise FieldError(name, f"must not be negative, got {value}")
        _at_least_one("lr_decay_steps", self.lr_decay_steps)

    def warmup_steps(self, total_steps: int) -> int:
        """Return the length of the warm-up in a run of `total_steps`."""
        return min(1000, total_steps // 10) if self.lr_warmup_steps is None else self.lr_warmup_steps


def learning_rate(step: int, section: LRSchedulerConfig, peak: float, total_steps: int) -> float:
    """Return the learning rate of one step.

    Args:
        step: from 1 to `total_steps`.
        section: warm-up and decay.
        peak: the optimizer's lr.
        total_steps: the run's length.

    Returns:
        init_lr + (peak − init_lr)·step/warmup during warm-up, so that the first step already moves; then `peak`
        decaying to `min_lr`, which is reached after the last step.
    """
    warmup = section.warmup_steps(total_steps)
    if step <= warmup:
        return section.init_lr + (peak - section.init_lr) * step / warmup
    if section.lr_decay_style == "constant":
        return peak
    end = section.lr_decay_steps or total_steps
    progress = min(1.0, (step - 1 - warmup) / max(1, end - warmup))
    remaining = 1.0 - progress if section.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_lr + (peak - section.min_lr) * remaining


def due(step: int, every: int | None) -> bool:
    """Say whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise FieldError(name, f"must be at least 1 (or null where optional), got {value}")
