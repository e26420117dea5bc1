"""How long a run is and how its weights move: `step_scheduler`, `optimizer`, `lr_scheduler`, `clip_grad_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmask.errors import FieldError


@dataclass(frozen=True)
class StepSchedulerConfig:
    """Section `step_scheduler`: sizes and intervals, in rows and optimizer steps.

    An epoch is counted in the rows that the source offers. Rows that turn out unusable are left out, which makes a pass
    shorter, so that a run may look at the rest more often than `num_epochs`; `max_steps` is exact.

    Attributes:
        global_batch_size: rows of one optimizer step, over all micro-batches; a multiple of `local_batch_size`
        local_batch_size: rows of one forward pass
        max_steps: stop after this many steps; null = by epochs alone
        num_epochs: stop after this many epochs, counted in rows offered; null = by steps alone
        ckpt_every_steps: save a checkpoint every so many steps, and at the end; null = at the end only
        val_every_steps: validate every so many steps, and at the end; null = at the end only; needs a
            `validation_dataset`
        val_at_start: validate before the first step too, as step 0
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
class OptimizerConfig:
    """Section `optimizer`: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Attributes:
        name: the optimizer
        lr: peak learning rate
        betas: decay of the two moments, each in [0, 1)
        eps: added to the root of the second moment
        weight_decay: decoupled decay of matrices, the embedding among them; norms and biases are never decayed
        stochastic_rounding: train bf16 weights without fp32 copies: torchao's AdamW rounds them up or down at random,
            right on average (see [fine-tuning.md](fine-tuning.md#weights-in-bf16)); needs
            `model.torch_dtype: bfloat16` and `unmask[lean]`
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise FieldError(name, f"must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError("betas", f"must lie in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class LRSchedulerConfig:
    """Section `lr_scheduler`: the learning rate over the run.

    Attributes:
        lr_decay_style: shape of the decay; `constant` stays at `optimizer.lr`
        lr_warmup_steps: steps of linear warm-up from `init_lr`; null = a tenth of the run, at most 1000
        init_lr: rate before the first warm-up step
        min_lr: rate after `lr_decay_steps`
        lr_decay_steps: step at which `min_lr` is reached; null = the end of the run
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


@dataclass(frozen=True)
class ClipConfig:
    """Section `clip_grad_norm`.

    Attributes:
        max_norm: gradients are scaled down to this global 2-norm; null = never
    """

    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.max_norm is not None and self.max_norm <= 0:
            raise FieldError("max_norm", f"must be positive or null, got {self.max_norm}")


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise FieldError(name, f"must be at least 1 (or null where optional), got {value}")
