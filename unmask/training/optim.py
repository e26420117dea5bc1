"""The optimizer: AdamW in one fused kernel, decay on matrices only, and gradient clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.config.training import OptimizerConfig


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
