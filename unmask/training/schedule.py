"""How long a run is, what happens when, and the learning rate of each step. Pure arithmetic, no torch."""

from __future__ import annotations

import math

from unmask.config.training import LRSchedulerConfig


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
