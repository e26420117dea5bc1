"""AdamW over the trainable parameters, and the clipping of their gradients.

bf16 has eight bits of precision, so a step smaller than 1/512 of a weight rounds back to that weight. Most steps are
smaller, and would be lost. A bf16 parameter therefore has an fp32 copy, its master, to which the steps are added
(`MasterAdamW`); or its steps are rounded up or down at random, unbiased (`optimizer.stochastic_rounding`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import compiles_on
from unmask.errors import ConfigError
from unmask.rng import key


class MasterAdamW(torch.optim.AdamW):
    """Fused AdamW that updates an fp32 copy of each bf16 parameter, its master (Micikevicius et al. 2018).

    `param_groups` and `state` hold the master in place of the parameter. Each backward pass adds the parameter's
    gradient to the master's `grad`, in fp32; after each step the master is rounded into the parameter.

    Attributes:
        masters: bf16 parameter → master, sharded like it; fp32 parameters have none.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.masters: dict[Tensor, Tensor] = {p: p.detach().float() for p in parameters if p.dtype == torch.bfloat16}
        for parameter, master in self.masters.items():
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master))
        updated = [{**group, "params": [self.masters.get(p, p) for p in group["params"]]} for group in groups]
        super().__init__(updated, fused=True, **options)
        if self.masters:
            self.register_step_post_hook(self._round)

    @torch.no_grad()
    def _round(self, *_: Any) -> None:
        torch._foreach_copy_([_local(p) for p in self.masters], [_local(m) for m in self.masters.values()])


def _move_gradient(master: Tensor, parameter: Tensor) -> None:
    """Add a parameter's gradient to its master's, and free the parameter's."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def masters_of(optimizer: Optimizer) -> Mapping[Tensor, Tensor]:
    """Return parameter → master, empty for an optimizer that has no masters."""
    return optimizer.masters if isinstance(optimizer, MasterAdamW) else {}


def build_optimizer(section: OptimizerConfig, model: nn.Module, seed: int = 42, shard: int = 0) -> Optimizer:
    """Build AdamW over the trainable parameters, with weight decay for matrices and none for vectors.

    Parameters on different device meshes are in different groups, because one fused kernel takes one mesh.

    Args:
        seed, shard: key the draws of stochastic rounding; `shard` numbers the ranks that hold different parts.

    Raises:
        ConfigError: stochastic rounding where nothing that is trained is bf16.
    """
    check_rounding(section, model)
    groups: dict[tuple[bool, Any], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix, mesh = parameter.dim() >= 2, getattr(parameter, "device_mesh", None)
            decay = section.weight_decay if matrix else 0.0
            group = groups.setdefault((not matrix, mesh), {"params": [], "weight_decay": decay})
            group["params"].append(parameter)
    ordered = [group for _, group in sorted(groups.items(), key=lambda item: item[0][0])]
    if section.stochastic_rounding:
        return _rounding_adamw(section, ordered, seed, shard)
    return MasterAdamW(ordered, lr=section.lr, betas=section.betas, eps=section.eps)


def check_rounding(section: OptimizerConfig, model: nn.Module) -> None:
    """Raise ConfigError for stochastic rounding where nothing that is trained is bf16."""
    if section.stochastic_rounding and all(p.dtype != torch.bfloat16 for p in model.parameters() if p.requires_grad):
        raise ConfigError(
            "optimizer.stochastic_rounding: rounds bfloat16 weights, and all that is trained is float32; set it to "
            "false"
        )


def _rounding_adamw(section: OptimizerConfig, groups: list[dict[str, Any]], seed: int, shard: int) -> Optimizer:
    """Return torchao's AdamW, which computes in fp32 and rounds bf16 weights up or down at random.

    It draws from torch's global generator, which is therefore seeded by (seed, shard, step) before each step: a resumed
    run rounds as one that never stopped, and ranks that hold the same shard round alike.
    """
    from torchao.optim import _AdamW

    optimizer = _AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, bf16_stochastic_round=True)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        # torchao would keep the second moment in bf16, where it never shrinks: a decay of 1 - 0.999 is rounded away.
        squares = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        average = torch.zeros_like(parameter, requires_grad=False)
        optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": average, "exp_avg_sq": squares}

    def before(*_: Any) -> None:
        step = max(
            int(state["step"]) for state in optimizer.state.values()
        )  # a parameter without a gradient counts no steps
        torch.manual_seed(key(seed, "rounding", epoch=shard, sample=step) % 2**32)
        if not compiles_on(parameters[0].device):  # torchao compiles the update of each shape
            torch.compiler.set_stance("force_eager")

    def after(*_: Any) -> None:
        torch.compiler.set_stance("default")

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def held_bytes(section: OptimizerConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return (bytes of the gradient, bytes of the optimizer's state) for one element of a trained weight."""
    if dtype != torch.bfloat16:
        return dtype.itemsize, 2 * dtype.itemsize
    return (2, 2 + 4) if section.stochastic_rounding else (4, 4 + 8)


def squared_norm(optimizer: Optimizer, copies: int) -> Tensor:
    """Return this rank's share of the squared 2-norm of all gradients, float32 scalar; the ranks' shares add up to it.

    `copies` ranks hold the same shard (HSDP), and share its part of the norm.
    """
    return torch.nn.utils.get_total_norm(_gradients(optimizer)).float().square() / copies


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return all gradients; of sharded ones this rank's part, sharing their memory."""
    gradients: list[Any] = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [_local(gradient) for gradient in gradients]


def clip_gradients(optimizer: Optimizer, max_norm: float | None, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients in place so that their global 2-norm is at most `max_norm`; None = leave them.

    Args:
        norm: the global norm, if ranks have summed their shares of it; None = this rank holds all gradients.

    Returns:
        the norm before scaling, float32 scalar. A norm that is not finite is returned and nothing is scaled.
    """
    gradients = _gradients(optimizer)
    if norm is None:
        norm = torch.nn.utils.get_total_norm(gradients).float()
    norm = norm.to(gradients[0].device)  # offloaded gradients are on the host
    # On the host the comparison is free, and saves a pass over all gradients in most steps. On an accelerator it would
    # wait for the whole backward pass, which costs more than multiplying.
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
        if isinstance(group["lr"], Tensor):  # as torchao has it, because compiled code reads it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
