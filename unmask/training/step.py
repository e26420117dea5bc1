"""The optimizer, and one step of it: corrupt every micro-batch, run each with the counts of all, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.batch import Batch, Corrupted
from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import Runtime, synchronise_gradients
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream


@dataclass(frozen=True)
class StepResult:
    """What one step measured over all ranks, on the host.

    Attributes:
        losses: value of each loss term, nats a counted unit, not weighted.
        loss: their weighted total.
        grad_norm: global 2-norm before clipping.
        tokens: positions that the network saw.
        supervised_tokens: positions that the loss may look at.
        finite: False when the loss or the norm was not; the update was then not made.
    """

    losses: dict[str, float]
    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    finite: bool


def train_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    noise: NoiseStream,
    optimizer: Optimizer,
    runtime: Runtime,
    max_norm: float | None,
    defer_grad_sync: bool = True,
) -> StepResult:
    """Update the model once on the micro-batches of one global batch, of which this rank has its own.

    Each loss term is a sum over all micro-batches and ranks divided once by the count of all, so that dividing the
    global batch otherwise changes nothing but rounding. A loss or gradient that is not finite leaves model and
    optimizer untouched, on every rank.

    Args:
        model, optimizer: shards of them where there are several ranks.
        batches: this rank's micro-batches.
        max_norm: gradients are scaled down to this global 2-norm; None = never.
        defer_grad_sync: with several ranks, sum gradients over them after the last micro-batch alone.
    """
    noisy = [objective.corrupt(batch, noise) for batch in batches]
    counts, tokens, supervised = _global_counts(noisy, batches, runtime)
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for number, part in enumerate(noisy, start=1):
        if runtime.meshes is not None:
            synchronise_gradients(model, not defer_grad_sync or number == len(noisy))
        with runtime.autocast():
            loss = objective.loss(model, part.to(runtime.device), counts)
        loss.total.backward()
        for name, term in loss.terms.items():
            sums[name] = sums.get(name, 0.0) + term.sum.float() / counts[name]
            weights[name] = term.weight
    if runtime.meshes is None:
        norm = clip_gradients(optimizer, max_norm)
        measured = torch.stack([*sums.values(), norm])
    else:
        # One collective: the terms' sums and every rank's share of the squared norm.
        share = squared_norm(optimizer, runtime.meshes.degrees.replicate).to(runtime.device)
        measured = runtime.ranks.sum_tensor(torch.stack([*sums.values(), share]))
        measured[-1] = clip_gradients(optimizer, max_norm, measured[-1].sqrt())
    # The one host synchronisation of a step: everything that is logged comes over together.
    *values, grad_norm = measured.tolist()
    finite = all(math.isfinite(value) for value in (*values, grad_norm))
    if finite:
        optimizer.step()
    losses = dict(zip(sums, values, strict=True))
    return StepResult(
        losses=losses,
        loss=sum(weights[name] * value for name, value in losses.items()),
        grad_norm=grad_norm,
        tokens=tokens,
        supervised_tokens=supervised,
        finite=finite,
    )


def _global_counts(
    noisy: Sequence[Corrupted], batches: Sequence[Batch], runtime: Runtime
) -> tuple[dict[str, float], int, int]:
    """Return each term's count, the positions seen and those supervised, over all ranks and micro-batches."""
    names = sorted(noisy[0].counts)
    counts = [sum(part.counts[name] for part in noisy) for name in names]
    tokens = sum(batch.input_ids_BL.numel() for batch in batches)
    supervised = int(sum(batch.answer_lengths_B.sum().item() for batch in batches))
    *counts, tokens, supervised = runtime.ranks.sum([*counts, tokens, supervised])
    return dict(zip(names, counts, strict=True)), int(tokens), int(supervised)


def build_optimizer(section: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Build fused AdamW over the trainable parameters: matrices with decay, vectors without.

    Parameters that are sharded over different ranks are in groups of their own, as one fused kernel takes one mesh.
    """
    groups: dict[tuple[bool, Any], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix, mesh = parameter.dim() >= 2, getattr(parameter, "device_mesh", None)
            decay = section.weight_decay if matrix else 0.0
            group = groups.setdefault((not matrix, mesh), {"params": [], "weight_decay": decay})
            group["params"].append(parameter)
    return torch.optim.AdamW(
        [group for _, group in sorted(groups.items(), key=lambda item: item[0][0])],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,
    )


def squared_norm(optimizer: Optimizer, copies: int) -> Tensor:
    """Return this rank's share of the squared 2-norm of all gradients, float32 scalar; the ranks' shares add up to it.

    `copies` ranks hold the same shard (HSDP), and share its part of the norm.
    """
    return torch.nn.utils.get_total_norm(_gradients(optimizer)).float().square() / copies


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return all gradients; of sharded ones this rank's part, sharing their memory."""
    gradients: list[Any] = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]


def clip_gradients(optimizer: Optimizer, max_norm: float | None, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients in place so that their global 2-norm is at most `max_norm`; None = any.

    Args:
        norm: the global norm, where ranks have summed their shares of it; None = all gradients are here.

    Returns:
        the norm before scaling, float32 scalar. A norm that is not finite is returned and nothing is scaled.
    """
    gradients = _gradients(optimizer)
    if norm is None:
        norm = torch.nn.utils.get_total_norm(gradients).float()
    norm = norm.to(gradients[0].device)  # which is the host's where they are offloaded
    # Where the norm is on the host, a comparison is free and saves a pass over all gradients in most steps; on an
    # accelerator it would wait for the whole backward pass, which costs more than the multiplication.
    if max_norm is not None and (norm.device.type != "cpu" or norm > max_norm):
        scale_gradients(gradients, norm, max_norm)
    return norm


def scale_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply gradients in place by min(1, max_norm / norm), by 1 when the norm is not finite, without a branch.

    `norm` is their global 2-norm, a float32 scalar on their device.
    """
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, torch.where(torch.isfinite(norm), coefficient, 1.0))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
