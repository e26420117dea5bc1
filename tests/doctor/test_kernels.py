"""Law: a kernel that computes something else than plain code is found, and each attention of a network is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unmask.config.model import ModelConfig
from unmask.config.objective import DllmConfig
from unmask.doctor.kernels import (
    GROUPS,
    TOLERANCE,
    check_attention,
    check_experts,
    grouped_error,
    masked_gradients_finite,
)
from unmask.doctor.subject import Subject
from unmask.doctor.trial import attention_calls, ragged_batch
from unmask.models.registry import plan_model
from unmask.objectives.registry import build_objective

CPU = torch.device("cpu")


@pytest.mark.parametrize("counts", GROUPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_groups_without_rows_equal_a_loop(dtype: torch.dtype, counts) -> None:
    assert grouped_error(CPU, dtype, counts) < TOLERANCE[dtype]


class _LeavesUnwritten(torch.autograd.Function):
    """A grouped matmul that computes its values, and leaves the gradients of matrices without rows as memory was."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        counts = offs.diff(prepend=torch.zeros(1, dtype=offs.dtype)).tolist()
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), weight, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        parts = list(zip(rows.split(ctx.counts), gradients[0].split(ctx.counts), weight, strict=True))
        of_weight = [part.t() @ grad if len(part) else torch.full_like(one, math.nan) for part, grad, one in parts]
        return torch.cat([grad @ matrix.t() for _, grad, matrix in parts]), torch.stack(of_weight), None


def test_a_kernel_that_leaves_a_gradient_unwritten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "grouped_mm", lambda rows, weight, offs: _LeavesUnwritten.apply(rows, weight, offs))
    assert grouped_error(CPU, torch.float32, (3, 4)) < TOLERANCE[torch.float32]
    assert grouped_error(CPU, torch.float32, (3, 0, 4)) == math.inf
    assert [finding.level for finding in check_experts(Subject(None, CPU))] == ["error", "error"]


def test_gradients_under_a_mask_are_finite_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert masked_gradients_finite(CPU)
    run = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest, **more: run(q * math.nan, *rest, **more))
    assert not masked_gradients_finite(CPU)


def planned(folder: Path) -> Any:
    return plan_model(ModelConfig(config=str(folder / "config.json")))


def test_each_attention_of_a_mask_network_is_named_with_its_kernel(fixtures: Path) -> None:
    plan = planned(fixtures / "llada_8b_instruct")
    calls = attention_calls(plan, build_objective(DllmConfig(), plan.config), ragged_batch(1000, 2, 64), CPU)
    ((call, times),) = calls.items()
    assert (times, call.query_BHQE, call.key_BGKE, call.mask) == (32, (2, 32, 64, 128), (2, 32, 64, 128), (2, 1, 1, 64))
    assert call.text == "32 heads of 128, 2 × 64 queries, 64 keys, masked"
    assert call.kernel(CPU, torch.bfloat16) == "flash"


def test_each_attention_of_a_canvas_network_is_named_with_its_kernel(fixtures: Path) -> None:
    found = list(check_attention(Subject("x", CPU, planned(fixtures / "diffusion_gemma_step"))))
    assert found[0].text == "not checked: attention on CUDA; torch sees no CUDA device here"
    said = [finding.text for finding in found[1:]]
    assert any("1024 queries, 1024 keys, causal: SDPA takes flash in float32" in line for line in said)
    assert any("heads over" in line and "256 queries" in line for line in said)
