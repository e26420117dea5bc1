"""LoRA on stacked experts: a low-rank pair for each expert, applied to the rows that were routed to it.

The update of expert e is s · B_e A_e. No W + s · B A is ever built: rows go through A and B by the same grouped matmul
that brings them through W. Parameters keep the expert in their first dimension, as the weights do, so that experts can
be spread over devices together with their adapters.

PEFT stores the pairs of all experts in two matrices (peft `tuners/lora/layer.py`, ParamWrapper): A as (E·R, I), experts
outermost, and B as (O, R·E), experts innermost.

Shapes: M rows sorted by expert, E experts, R rank, I inputs, O outputs, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unmask.models.experts import Experts, gated_mlps, grouped_linear


class AdaptedExperts(nn.Module):
    """Frozen `Experts` with low-rank updates on `targets`, of `gate_up_proj` and `down_proj`."""

    def __init__(self, base_layer: Experts, targets: Sequence[str], rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for name in targets:
            weight_EOI: Tensor = getattr(base_layer, name)
            experts, outputs, inputs = weight_EOI.shape
            fresh = {"dtype": torch.float32, "device": weight_EOI.device}
            # As PEFT draws them: A uniform within 1/√I, B zero, so that a fresh adapter changes nothing.
            bound = 1 / math.sqrt(inputs)
            self.lora_A[name] = nn.Parameter(torch.empty(experts, rank, inputs, **fresh).uniform_(-bound, bound))
            self.lora_B[name] = nn.Parameter(torch.zeros(experts, outputs, rank, **fresh))

    @property
    def num_experts(self) -> int:
        """How many experts are held here."""
        return self.base_layer.num_experts

    def linear(self, name: str, rows_MI: Tensor, counts_E: Tensor) -> Tensor:
        """Multiply rows by the adapted matrices called `name`, each run of rows by its expert's."""
        out_MO = self.base_layer.linear(name, rows_MI, counts_E)
        if name not in self.lora_A:
            return out_MO
        low_MR = grouped_linear(rows_MI, self.lora_A[name], counts_E) * self.scaling
        return out_MO + grouped_linear(low_MR, self.lora_B[name], counts_E)

    def forward(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Return each row's output of its adapted expert, (M, D); arguments as in `Experts.forward`."""
        return gated_mlps(self.linear, self.base_layer.activation, sorted_MD, counts_E)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Experts:
        """Return the base with W_e + s · B_e A_e in place of W_e, summed in fp32 and rounded once, an expert at a time.

        `dtype` is that of the adapted matrices; None = their own.
        """
        for name in self.lora_A:
            weight_EOI: nn.Parameter = getattr(self.base_layer, name)
            summed_EOI = (
                weight_EOI.data if dtype in (None, weight_EOI.dtype) else torch.empty_like(weight_EOI, dtype=dtype)
            )
            for expert, base_OI in enumerate(weight_EOI):
                update_OI = self.lora_B[name][expert].float() @ self.lora_A[name][expert].float()
                summed_EOI[expert] = base_OI.float() + self.scaling * update_OI
            weight_EOI.data = summed_EOI
        return self.base_layer


def to_file(side: str, stacked: Tensor) -> Tensor:
    """Return PEFT's matrix of a stack: `lora_A` (E, R, I) → (E·R, I), `lora_B` (E, O, R) → (O, R·E)."""
    return stacked.flatten(0, 1) if side == "lora_A" else stacked.permute(1, 2, 0).flatten(1)


def from_file(side: str, matrix: Tensor, experts: int) -> Tensor:
    """Return the stack of PEFT's matrix; the inverse of `to_file`. The matrix must divide by the number of experts."""
    if side == "lora_A":
        return matrix.unflatten(0, (experts, -1))
    return matrix.unflatten(1, (-1, experts)).permute(2, 0, 1)
