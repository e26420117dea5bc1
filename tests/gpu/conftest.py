"""What the checks of one device stand on (`make gpu`). Each compares with the CPU, whose tests hold to references.

A check that takes `device` runs on a CUDA device under `make gpu`, and on the CPU among the slow tests, where its logic
is tried; one that takes `cuda` has no meaning on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.config.objective import DllmConfig
from unmask.models.registry import family_of
from unmask.objectives.registry import OBJECTIVES, Objective, build_objective
from unmask.rng import NoiseStream

Step = Callable[[nn.Module, Batch, torch.device, "torch.dtype | None"], tuple[Tensor, dict[str, Tensor]]]


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device: this check needs one (`make test` runs what needs none)")


def opened(name: str) -> torch.device:
    """Return a device, on which fp32 is fp32 from now on."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return torch.device(name)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return opened("cuda")


@pytest.fixture(
    scope="session", params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return opened(request.param)


def rows(lengths: list[int], cut: bool) -> Batch:
    """Return rows of random tokens, their first twelve a prompt; `cut` ones go on after their last token."""
    lengths_B = torch.tensor(lengths)
    position_L = torch.arange(max(lengths))[None]
    real_BL = position_L < lengths_B[:, None]
    supervised_BL = real_BL & (position_L >= 12)
    ids_BL = torch.randint(10, 400, real_BL.shape, generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids_BL=torch.where(real_BL, ids_BL, 0),
        supervised_BL=supervised_BL,
        attention_mask_BL=real_BL,
        answer_lengths_B=supervised_BL.sum(1),
        sample_ids_B=torch.arange(len(lengths)),
        epoch=0,
        slots_B=torch.arange(len(lengths)),
        global_rows=len(lengths),
        cut_B=torch.full((len(lengths),), cut),
        peers_P=torch.arange(len(lengths)),
    )


@pytest.fixture(scope="session")
def batches() -> dict[str, Batch]:
    """Four rows: of equal length, of unequal length, and of unequal length cut off."""
    ragged = [64, 50, 33, 60]
    return {"plain": rows([64] * 4, False), "ragged": rows(ragged, False), "cut": rows(ragged, True)}


@pytest.fixture(scope="session")
def batch(batches: dict[str, Batch]) -> Batch:
    """Four rows of unequal length."""
    return batches["ragged"]


@pytest.fixture(scope="session")
def folders(fixtures: Path) -> dict[str, str]:
    """Family → a small checkpoint of it."""
    return {"llada": str(fixtures / "llada_tiny"), "diffusion_gemma": str(fixtures / "diffusion_gemma_step")}


def objective_for(config: Any) -> Objective:
    """Return the objective that trains a network of this configuration, at levels that leave something to predict."""
    family = family_of(config)
    kind = family.noise, family.attention
    mode = next(mode for mode, entry in OBJECTIVES.items() if (entry.noise, entry.attention) == kind)
    return build_objective(DllmConfig(mode=mode, eps=0.2), config)


@pytest.fixture(scope="session")
def objective_of() -> Callable[[Any], Objective]:
    return objective_for


@pytest.fixture(scope="session")
def step_of() -> Step:
    """Return a function that gives the loss and the gradients of one step of a network on a batch."""

    def run(
        model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = objective_for(model.config)
        noisy = objective.corrupt(batch, NoiseStream(3)).to(device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = objective.loss(model, noisy).total
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return loss.detach(), gradients

    return run


@pytest.fixture(scope="session")
def far() -> Callable[[Any, Any], float]:
    """Return a function that gives the distance of two tensors, or of two sets of them, in the second's norm."""

    def distance(found: Any, expected: Any) -> float:
        found, expected = ((part.values() if isinstance(part, dict) else [part]) for part in (found, expected))
        pairs = [
            (one.detach().cpu().double(), other.detach().cpu().double())
            for one, other in zip(found, expected, strict=True)
        ]
        error = sum(float((one - other).square().sum()) for one, other in pairs)
        return (error / sum(float(other.square().sum()) for _, other in pairs)) ** 0.5

    return distance
