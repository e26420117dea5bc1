"""Law: two runs of the same step give the same bits with two threads too, where sums could be raced for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unmask.batch import Batch
from unmask.models.diffusion_gemma.family import parse_config
from unmask.models.diffusion_gemma.model import DiffusionGemma
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.rng import NoiseStream

Turns = Callable[..., Batch]
VOCABULARY, WIDTH = 40, 64
pytestmark = pytest.mark.usefixtures("two_threads")


def llada(_: Callable[..., dict]) -> tuple[Any, Any, int]:
    config = LLaDAConfig(
        d_model=WIDTH, n_heads=4, n_layers=2, mlp_hidden_size=96, max_sequence_length=256, vocab_size=VOCABULARY,
        embedding_size=VOCABULARY, mask_token_id=39, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LLaDA(config), MDLM(mask_token_id=39), 24


def gemma(gemma_values: Callable[..., dict]) -> tuple[Any, Any, int]:
    values = gemma_values(8, hidden_size=WIDTH, num_experts=8, top_k_experts=4, moe_intermediate_size=16)
    model = DiffusionGemma(parse_config(values, "config.json"))
    return model, CanvasDiffusion(8, VOCABULARY, 1, self_conditioning_p=0.5), 6


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [llada, gemma])
def test_a_step_has_the_same_gradients_in_every_run(
    gemma_values: Callable[..., dict], turns: Turns, family: Callable[..., tuple[Any, Any, int]], autocast: bool
) -> None:
    model, objective, rows = family(gemma_values)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    batch = turns([[(9, False), (100, True)], [(3, False), (40, True), (30, False), (37, True)]] * rows)
    noisy = objective.corrupt(batch, NoiseStream(0))

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = objective.loss(model, noisy).total
        return [total.detach(), *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)]

    first, names = run(), ["loss", *dict(model.named_parameters())]
    assert sum(grad is not None and bool(grad.any()) for grad in first) > 15
    for _ in range(4):
        parted = [
            name for name, one, other in zip(names, first, run(), strict=True)
            if one is not None and not torch.equal(one, other)
        ]  # fmt: skip
        assert not parted
