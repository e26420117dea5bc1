"""Experts with few rows or none: the grouped matmul against a loop, and the exchange in a group of one.

Checks 3 and 4 of `make gpu`. On a CPU the same runs with the kernel that is there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unmask.distributed.expert_parallel import expert_dispatch
from unmask.models import experts as experts_module
from unmask.models.diffusion_gemma.model import gelu
from unmask.models.experts import Experts, grouped_kernel, grouped_linear, local_dispatch


def spoil(device: torch.device) -> None:
    """Leave NaN in the memory that is allocated next."""
    spoilt = [torch.full((size,), torch.nan, device=device) for size in (2**12, 2**16, 2**20, 2**24)]
    del spoilt


@pytest.mark.parametrize("kernel", [True, False], ids=["grouped", "loop"])
@pytest.mark.parametrize("counts", [[0, 5, 0, 7, 4, 0], [0, 0, 300, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1] * 6], ids=str)
def test_empty_groups(device: torch.device, counts: list[int], kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(sum(counts), 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(6, 96, 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
    probe = torch.randn(sum(counts), 96, generator=generator).to(device, torch.bfloat16)
    if not kernel:
        monkeypatch.setattr(experts_module, "grouped_kernel", lambda *_: False)
    elif not grouped_kernel(rows, weight):
        pytest.skip("the device has no grouped kernel")
    for _ in range(3):
        spoil(device)
        out = grouped_linear(rows, weight, torch.tensor(counts, device=device))
        spoil(device)
        rows_grad, weight_grad = torch.autograd.grad(out, [rows, weight], probe)
        parts = zip(rows.split(counts), probe.split(counts), weight, strict=True)
        for number, (part, grad, matrix) in enumerate(parts):
            at = slice(sum(counts[:number]), sum(counts[: number + 1]))
            for ours, theirs in (
                (out[at], part.float() @ matrix.float().t()),
                (rows_grad[at], grad.float() @ matrix.float()),
                (weight_grad[number], grad.float().t() @ part.float()),
            ):
                torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=0.3)
        unused = torch.tensor(counts) == 0
        assert not weight_grad.cpu()[unused].any()


@pytest.fixture
def alone(device: torch.device, tmp_path: Path) -> Iterator[None]:
    options = {"device_id": torch.device("cuda", 0)} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1, **options)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_the_exchange_in_a_group_of_one_changes_nothing(device: torch.device, alone: None, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    experts = Experts(8, 64, 32, gelu)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    hidden = torch.randn(tokens, 64, generator=generator)
    chosen = torch.rand(tokens, 8, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    found: list[list[Tensor]] = []
    for dispatch in (local_dispatch, expert_dispatch(dist.group.WORLD)):  # pyright: ignore[reportArgumentType]
        held = copy.deepcopy(experts).to(device, torch.bfloat16)
        leaves = [
            hidden.to(device, torch.bfloat16).requires_grad_(),
            weights.to(device).requires_grad_(),
            *held.parameters(),
        ]
        mixed = dispatch(leaves[0], chosen.to(device), leaves[1], held)
        found.append([mixed, *torch.autograd.grad(mixed.float().sin().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
