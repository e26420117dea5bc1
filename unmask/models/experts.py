"""A mixture of experts: stacked gated MLPs, and the dispatch that brings tokens and their experts together.

Every token is computed by all experts that it was routed to; nothing is dropped. The dispatch is a plain function, so
that experts can live on other devices: it gets the tokens, the choice and the `Experts` module and returns the mix.

Shapes: N tokens, D width, E experts, T experts a token, M = N · T (token, expert) pairs sorted by expert, I width of an
expert, O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.ops.head import compute_dtype
from unmask.ops.rows import in_order, inverse

Activation = Callable[[Tensor], Tensor]
Dispatch = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor]


class Experts(nn.Module):
    """The gated MLPs of all experts in two stacked matrices: down(activation(gate(x)) · up(x))."""

    def __init__(self, num_experts: int, hidden_size: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    @property
    def num_experts(self) -> int:
        """How many experts are held here."""
        return len(self.gate_up_proj)

    def linear(self, name: str, rows_MI: Tensor, counts_E: Tensor) -> Tensor:
        """Multiply rows by the matrices called `name`, each run of rows by its expert's."""
        return grouped_linear(rows_MI, getattr(self, name), counts_E)

    def forward(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Return each row's output of its expert, (M, D).

        Args:
            sorted_MD: tokens in the order of their experts.
            counts_E: int64, rows of each expert held here, adding up to M.
        """
        return gated_mlps(self.linear, self.activation, sorted_MD, counts_E)


def gated_mlps(
    linear: Callable[[str, Tensor, Tensor], Tensor], activation: Activation, sorted_MD: Tensor, counts_E: Tensor
) -> Tensor:
    """Return down(activation(gate(x)) · up(x)) of every row; `linear`: `Experts.linear`, or one that does more."""
    gate_MI, up_MI = linear("gate_up_proj", sorted_MD, counts_E).chunk(2, dim=-1)
    return linear("down_proj", activation(gate_MI) * up_MI, counts_E)


def local_dispatch(hidden_ND: Tensor, experts_NT: Tensor, weights_NT: Tensor, experts: nn.Module) -> Tensor:
    """Return Σ_t w_t · expert_t(x) for each token, all experts on this device; (N, D), as wide as the weights.

    `experts` is called with (sorted_MD, counts_E) and has `num_experts`.
    """
    tokens, choices = experts_NT.shape
    order_M, counts_E = sort_by_expert(experts_NT, experts.num_experts)  # pyright: ignore[reportArgumentType]
    inverse_M = inverse(order_M)
    mixed_MD = experts(in_order(hidden_ND, order_M, inverse_M, choices), counts_E)
    # Brought back by a permutation and summed over T, which adds in the same order on every device and in every run.
    mixed_NTD = in_order(mixed_MD, inverse_M, order_M).view(tokens, choices, hidden_ND.shape[1])
    return (mixed_NTD * weights_NT[..., None]).sum(dim=1)


def sort_by_expert(experts_NT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the (token, expert) pairs' order by expert, int64 (M,), and how many each has, int64 (E,).

    Pair m of the flattened (N, T) belongs to token m // T. Nothing here waits for a device.
    """
    flat_M = experts_NT.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_M.device)
    counts_E.scatter_add_(0, flat_M, torch.ones_like(flat_M))
    return flat_M.argsort(stable=True), counts_E


def grouped_linear(rows_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each run of rows by its own matrix, in autocast's dtype if it is on: expert e's become x W_eᵀ; (M, O).

    `counts_E` has the rows of each expert, which come in the order of experts and add up to M.
    """
    compute = compute_dtype(rows_MI)
    rows_MI, weight_EOI = rows_MI.to(compute), weight_EOI.to(compute)
    if not len(rows_MI):  # kernels for groups are not made for no rows at all; this too gives every matrix a gradient
        return F.linear(rows_MI, weight_EOI[0])
    if grouped_kernel(rows_MI, weight_EOI):
        ends_E = counts_E.cumsum(dim=0).to(torch.int32)
        if weight_EOI.requires_grad and not zeroes_unused(weight_EOI.device):
            weight_EOI = _ZeroUnused.apply(weight_EOI, counts_E)
        return F.grouped_mm(rows_MI, weight_EOI.transpose(1, 2), offs=ends_E)
    parts = rows_MI.split(counts_E.tolist())
    return torch.cat([part @ weight_OI.t() for part, weight_OI in zip(parts, weight_EOI, strict=True)])


def grouped_kernel(rows_MI: Tensor, weight_EOI: Tensor) -> bool:
    """Say whether `F.grouped_mm` takes these without waiting: strides multiples of 16 bytes; on GPUs bf16.

    And a kernel for the device, which Hopper and data-centre Blackwell have; for others PyTorch loops on the host
    (aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    lengths = (rows_MI.shape[1], weight_EOI.shape[1])
    if any(length * rows_MI.element_size() % 16 for length in lengths) or rows_MI.dtype == torch.float64:
        return False
    if rows_MI.device.type == "cpu":
        return True
    # torch.compile knows this function and takes what it says for a constant.
    return rows_MI.dtype == torch.bfloat16 and torch.cuda.get_device_properties(rows_MI.device).major in (9, 10)


def zeroes_unused(device: torch.device) -> bool:
    """Say whether `F.grouped_mm` gives experts without rows a gradient of zeros.

    On Blackwell it leaves in it what the memory held (PyTorch issue 172439, CUTLASS issue 2674).
    """
    return device.type == "cpu" or torch.cuda.get_device_properties(device).major == 9


class _ZeroUnused(torch.autograd.Function):
    """Stacked matrices as they are; on the way back those of experts without rows get a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (counts_E,) = ctx.saved_tensors
        return gradients[0].masked_fill((counts_E == 0)[:, None, None], 0.0), None


def freeze_routers(model: nn.Module) -> None:
    """Have every router that can stop learning which expert sees what (`freeze_routing`) do so."""
    for module in model.modules():
        if hasattr(module, "freeze_routing"):
            module.freeze_routing()  # pyright: ignore[reportCallIssue]
