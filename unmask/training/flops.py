"""Floating-point operations of a training step, counted from sizes, and the rate of this device's matrix products.

MFU (model FLOPs utilization; Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the number of operations in the
step's matrix products, divided by the number that the device can do in the step's time. Nothing else is counted, and
what activation checkpointing computes a second time is not counted again. Attention is counted over all pairs of
queries and keys, those that a mask hides among them, as `torch.utils.flop_counter` counts it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.batch import Work
from unmask.ops.head import Head

# Dense bf16 operations a second, by words of the device's name (NVIDIA's data sheets, values without sparsity); the
# first that fits counts. Whole words: an L40 is no L4, and a GB200 no B200.
PEAK_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


@dataclass(frozen=True)
class StepFlops:
    """What one position costs in a network, from which the operations of a micro-batch are counted.

    Attributes:
        blocks: elements of the matrices that a position is multiplied by in all blocks; of experts, those that it is
            sent to.
        outer: the same of the matrices outside the blocks, other than embedding and head.
        head: elements of the head's matrix.
        trained_blocks, trained_outer, trained_head: those of them that have a gradient.
        attention: (width of the queries, window) of each layer, as of `Family.attention_layers`.
    """

    blocks: float
    outer: float
    head: float
    trained_blocks: float
    trained_outer: float
    trained_head: float
    attention: Sequence[tuple[int, int | None]]

    def __call__(self, work: Work) -> float:
        """Return the operations of a micro-batch, a multiply-add being two.

        For each position a matrix costs 2 operations an element in the forward pass, 2 for the gradient of its input
        and 2 for its own gradient. Attention costs two products forward and four backward.
        """
        total = 0.0
        for run in work.passes:
            positions = run.queries * len(run.before)
            forward = positions * (self.blocks + run.outer * self.outer)
            trained = positions * (self.trained_blocks + run.outer * self.trained_outer)
            attention = sum(2 * width * _pairs(run.queries, run.before, window) for width, window in self.attention)
            total += forward + attention
            if run.gradient:
                total += forward + trained + 2 * attention
        total += work.scored * (2 * self.head + self.trained_head)  # logits, gradients of their input and the head
        total += work.mixed * (2 * self.head + self.trained_head)  # logits, the mix of embeddings and their gradient
        return 2 * total


def _pairs(queries: int, before: Sequence[int], window: int | None) -> int:
    """Return the pairs of queries and keys in all rows.

    A query sees all queries of its row and, of the positions `before` them, as many as its window reaches.
    """
    return sum(queries * (queries + (some if window is None else min(some, window - 1))) for some in before)


def count_flops(
    model: Any, family: Any, config: Any, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> StepFlops:
    """Return what one position costs in a network, from the names and sizes of its matrices.

    Args:
        model: the network, whole or sharded.
        family, config: its `Family` record and configuration.
        whole: parameter → a tensor of the size that it has in the whole network.
    """
    head: Head = model.head
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sums: dict[str, float] = dict.fromkeys(("blocks", "outer", "trained_blocks", "trained_outer"), 0.0)
    plan = family.shard
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings or parameter is head.weight:
            continue
        elements = whole(parameter).numel() * (2 if parameter.dtype == torch.uint8 else 1)  # 4-bit bases hold two
        place = "outer"
        if name.startswith(plan.blocks + "."):
            place = "blocks"
            if plan.experts and f".{plan.experts}." in name:
                elements *= config.top_k_experts / config.num_experts
        sums[place] += elements
        sums[f"trained_{place}"] += elements * parameter.requires_grad
    size = float(whole(head.weight).numel())
    return StepFlops(
        **sums, head=size, trained_head=size * head.weight.requires_grad, attention=family.attention_layers(config)
    )


@dataclass(frozen=True)
class Peak:
    """The rate of a device's matrix products that MFU compares with.

    Attributes:
        flops: operations a second.
        source: where it is from: `table` (the maker's number) or `measured` (a large matrix product on the device).
    """

    flops: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the rate of a device's matrix products in a dtype; measured where `PEAK_BF16` does not have it."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_BF16.items():
            if re.search(rf"\b{part}\b", name):
                return Peak(flops, "table")
    return Peak(_measured(device, dtype), "measured")


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Return the best of several products of square matrices, in operations a second."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        began = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
