"""Decay groups and clipping, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unmask.config.training import OptimizerConfig
from unmask.training.optim import build_optimizer, clip_gradients, scale_gradients, set_learning_rate


def network() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def with_gradients(model: nn.Module, scale: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return model


def test_matrices_decay_and_vectors_do_not() -> None:
    model = network()
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), model)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert decayed == {id(model[0].weight), id(model[2].weight)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(), model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_the_update_is_adamw() -> None:
    section = OptimizerConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    ours, reference = network(), network()
    reference.load_state_dict(ours.state_dict())
    mine = build_optimizer(section, ours)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    for _ in range(3):
        with_gradients(ours), with_gradients(reference)
        mine.step(), theirs.step()
    for mine_, theirs_ in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine_, theirs_)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_is_torchs(scale: float) -> None:
    ours, reference = with_gradients(network(), scale), with_gradients(network(), scale)
    norm = clip_gradients(build_optimizer(OptimizerConfig(), ours), 1.0)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_no_limit_only_measures() -> None:
    model = with_gradients(network(), 100.0)
    before = [p.grad.clone() for p in model.parameters()]
    assert clip_gradients(build_optimizer(OptimizerConfig(), model), None) > 100
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_is_not_spread() -> None:
    model = with_gradients(network())
    model[2].bias.grad[0] = float("inf")
    before = model[0].weight.grad.clone()
    assert not torch.isfinite(clip_gradients(build_optimizer(OptimizerConfig(), model), 1.0))
    assert torch.equal(model[0].weight.grad, before)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, float("inf"), float("nan")])
def test_clipping_without_a_branch_is_clipping_with_one(scale: float) -> None:
    # `clip_gradients` compares on the host here; on an accelerator it always calls `scale_gradients`.
    branching, straight = with_gradients(network(), scale), with_gradients(network(), scale)
    norm = clip_gradients(build_optimizer(OptimizerConfig(), branching), 2.0)
    scale_gradients([p.grad for p in straight.parameters()], norm, 2.0)
    for one, other in zip(branching.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_the_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), network())
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
