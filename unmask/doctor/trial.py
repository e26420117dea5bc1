"""The network on a small batch of random tokens: which attention it asks for, and whether its loss is a number.

Shapes: B rows, L positions, H query heads, G key/value heads, E head size; Q and K are L as the positions that look and
those that are looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from unmask.batch import Batch
from unmask.distributed.runtime import Runtime
from unmask.models.layers import takes_groups
from unmask.models.loading import empty_network
from unmask.models.registry import ModelPlan
from unmask.objectives.registry import Objective
from unmask.rng import NoiseStream


def ragged_batch(vocabulary: int, rows: int, length: int) -> Batch:
    """Return rows of random tokens of unequal length, the longest of `length`, the first quarter of each a prompt."""
    lengths_B = torch.tensor([length - (row % 4) * (length // 8) for row in range(rows)])
    position_L = torch.arange(length)[None]
    real_BL = position_L < lengths_B[:, None]
    supervised_BL = real_BL & (position_L >= length // 4)
    ids_BL = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids_BL=torch.where(real_BL, ids_BL, 0),
        supervised_BL=supervised_BL,
        attention_mask_BL=real_BL,
        answer_lengths_B=supervised_BL.sum(1),
        sample_ids_B=torch.arange(rows),
        epoch=0,
        slots_B=torch.arange(rows),
        global_rows=rows,
        cut_B=torch.zeros(rows, dtype=torch.bool),
        peers_P=torch.arange(rows),
    )


@dataclass(frozen=True)
class AttentionCall:
    """The shapes of one call of scaled_dot_product_attention.

    Attributes:
        mask: shape of the mask; None without one.
    """

    query_BHQE: tuple[int, ...]
    key_BGKE: tuple[int, ...]
    mask: tuple[int, ...] | None
    causal: bool
    grouped: bool

    @property
    def text(self) -> str:
        """The call in words."""
        rows, heads, queries, size = self.query_BHQE
        shared = f" over {self.key_BGKE[1]}" if heads != self.key_BGKE[1] else ""
        extra = ", causal" * self.causal + ", masked" * (self.mask is not None)
        return f"{heads} heads{shared} of {size}, {rows} × {queries} queries, {self.key_BGKE[2]} keys{extra}"

    def kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the kernel that SDPA takes for such a call in training on a device."""
        heads, size, key_BGKE, grouped = self.query_BHQE[1], self.query_BHQE[3], self.key_BGKE, self.grouped
        if grouped and not takes_groups(size, self.mask is not None, dtype, device.type):  # `attend` repeats them
            key_BGKE, grouped = (key_BGKE[0], heads, *key_BGKE[2:]), False
        q_BHQE = torch.empty(self.query_BHQE, device=device, dtype=dtype, requires_grad=True)
        k_BGKE = torch.empty(key_BGKE, device=device, dtype=dtype, requires_grad=True)
        mask = None if self.mask is None else torch.ones(self.mask, device=device, dtype=torch.bool)
        choice = torch._fused_sdp_choice(
            q_BHQE, k_BGKE, k_BGKE, attn_mask=mask, is_causal=self.causal, enable_gqa=grouped
        )
        return KERNELS[choice]


# torch.nn.attention.SDPBackend by number.
KERNELS = {-1: "none", 0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN", 4: "overrideable"}


class _Listener(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[AttentionCall] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = (tuple(tensor.shape) for tensor in args[:2])
            mask = kwargs.get("attn_mask")
            call = AttentionCall(
                query,
                key,
                None if mask is None else tuple(mask.shape),
                kwargs.get("is_causal", False),
                kwargs.get("enable_gqa", False),
            )
            self.calls[call] += 1
        return func(*args, **kwargs)


def attention_calls(
    plan: ModelPlan, objective: Objective, batch: Batch, device: torch.device
) -> Counter[AttentionCall]:
    """Return which attention a network asks for in one loss, and how often; no memory is taken, nothing computed."""
    noisy, before = objective.corrupt(batch, NoiseStream(0)), torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Listener() as listener:
        torch.set_default_dtype(torch.bfloat16)  # the one dtype that a grouped matmul takes without memory
        try:
            with device:
                model = empty_network(plan.family, plan.config)
        finally:
            torch.set_default_dtype(before)
        objective.loss(model, noisy.to(device))
    return listener.calls


def finite_loss(model: nn.Module, objective: Objective, batch: Batch, runtime: Runtime) -> float | None:
    """Return the loss of a network on a batch, without gradient; None where it is no finite number."""
    noisy = objective.corrupt(batch, NoiseStream(0)).to(runtime.device)
    with torch.no_grad(), runtime.autocast():
        loss = float(objective.loss(model, noisy).total)
    return loss if math.isfinite(loss) else None
