"""A mixture of experts: the router picks experts for each token, a dispatch brings tokens and experts together.

Every token is computed by all experts that it was routed to; nothing is dropped. The dispatch is a plain function, so
that experts can live on other devices: it gets the tokens, the choice and the `Experts` module and returns the mix.

Shapes: N tokens, D width, E experts, T experts a token, M = N · T (token, expert) pairs sorted by expert, I width of an
expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.layers import RMSNorm
from unmask.ops.rows import inverse, permute_rows, take_rows


class Router(nn.Module):
    """Softmax routing in fp32, the T best renormalised (transformers `modeling_diffusion_gemma.py`, TextRouter).

    Also the projection is computed in fp32: in bf16 experts with nearly equal scores would be chosen by rounding.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, eps: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = RMSNorm(hidden_size, eps, scale=False)
        self.proj = nn.Linear(hidden_size, num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(num_experts))

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts, int64 (N, T), and their weights, float32 (N, T)."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            normed_ND = self.norm(hidden_ND.float()) * self.scale.float() * hidden_ND.shape[-1] ** -0.5
            scores_NE = F.linear(normed_ND, self.proj.weight.float()).softmax(dim=-1)
            weights_NT, experts_NT = scores_NE.topk(self.top_k, dim=-1)
            weights_NT = weights_NT / weights_NT.sum(dim=-1, keepdim=True)
            return experts_NT, weights_NT * take_rows(self.per_expert_scale.float(), experts_NT.flatten()).view_as(
                weights_NT
            )


def freeze_routers(model: nn.Module) -> None:
    """Take the projection and the scale of every router out of training: which expert sees what stays as it was.

    The scale of an expert's output is trained on, as in NeMo AutoModel's DiffusionGemma recipe.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.proj.weight.requires_grad_(False)
            module.scale.requires_grad_(False)


class Experts(nn.Module):
    """The gated MLPs of all experts in two stacked matrices: down(gelu(gate(x)) · up(x))."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
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
        return gated_mlps(self.linear, sorted_MD, counts_E)


def gated_mlps(linear: Callable[[str, Tensor, Tensor], Tensor], sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
    """Return down(gelu(gate(x)) · up(x)) for every row; `linear`: `Experts.linear`, or one that does more."""
    gate_MI, up_MI = linear("gate_up_proj", sorted_MD, counts_E).chunk(2, dim=-1)
    return linear("down_proj", F.gelu(gate_MI, approximate="tanh") * up_MI, counts_E)


Dispatch = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor]


def local_dispatch(hidden_ND: Tensor, experts_NT: Tensor, weights_NT: Tensor, experts: nn.Module) -> Tensor:
    """Return Σ_t w_t · expert_t(x) for each token, all experts on this device; (N, D).

    Args:
        hidden_ND: tokens.
        experts_NT, weights_NT: from `Router`.
        experts: called with (sorted_MD, counts_E); has `num_experts`.
    """
    tokens, choices = experts_NT.shape
    order_M, counts_E = sort_by_expert(experts_NT, experts.num_experts)  # pyright: ignore[reportArgumentType]
    back_M = inverse(order_M)
    mixed_MD = experts(permute_rows(hidden_ND, order_M, back_M, copies=choices), counts_E)
    # Brought back by a permutation and summed over T, which adds in the same order on every device and in every run.
    mixed_NTD = permute_rows(mixed_MD, back_M, order_M).view(tokens, choices, hidden_ND.shape[1])
    return (mixed_NTD * weights_NT[..., None]).sum(dim=1).to(hidden_ND.dtype)


def sort_by_expert(experts_NT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the (token, expert) pairs' order by expert, int64 (M,), and how many each has, int64 (E,).

    Pair m of the flattened (N, T) belongs to token m // T. Nothing here waits for a device.
    """
    flat_M = experts_NT.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_M.device)
    counts_E.scatter_add_(0, flat_M, torch.ones_like(flat_M))
    return flat_M.argsort(stable=True), counts_E


def grouped_linear(rows_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each run of rows by its own matrix: rows of expert e become x W_eᵀ; (M, O).

    Computed in autocast's dtype where it is on. One grouped kernel where there is one for the dtype and the strides
    (torch.nn.functional.grouped_mm), else a matmul an expert.

    Args:
        rows_MI: sorted by expert.
        weight_EOI: one matrix an expert.
        counts_E: rows of each, adding up to M.
    """
    kind = rows_MI.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows_MI.dtype
    rows_MI, weight_EOI = rows_MI.to(compute), weight_EOI.to(compute)
    if grouped_kernel(rows_MI, weight_EOI):
        ends_E = counts_E.cumsum(dim=0).to(torch.int32)
        return F.grouped_mm(rows_MI, weight_EOI.transpose(1, 2), offs=ends_E)
    parts = rows_MI.split(counts_E.tolist())
    return torch.cat([part @ weight_OI.t() for part, weight_OI in zip(parts, weight_EOI, strict=True)])


def grouped_kernel(rows_MI: Tensor, weight_EOI: Tensor) -> bool:
    """Say whether `grouped_mm` takes these: every stride a multiple of 16 bytes; on CUDA bf16 and Hopper or later."""
    lengths = (rows_MI.shape[1], weight_EOI.shape[1])
    if any(length * rows_MI.element_size() % 16 for length in lengths) or rows_MI.dtype == torch.float64:
        return False
    if rows_MI.device.type == "cuda":
        return rows_MI.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows_MI.device) >= (9, 0)
    return rows_MI.device.type == "cpu"
