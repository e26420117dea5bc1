"""The head against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmask.ops.head import Head


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("has_bias", [True, False])
def test_logits_are_the_formula(softcap: float | None, scale: float, has_bias: bool) -> None:
    hidden, weight = 5 * normal(2, 3, 4), normal(7, 4, seed=1)
    bias = normal(7, seed=2) if has_bias else None
    z = scale * hidden @ weight.T + (0 if bias is None else bias)
    expected = z if softcap is None else softcap * torch.tanh(z / softcap)
    torch.testing.assert_close(Head(weight, bias, softcap, scale).logits(hidden), expected)


def test_softcapped_logits_are_fp32_at_least() -> None:
    hidden, weight = normal(3, 4).bfloat16(), normal(7, 4).bfloat16()
    assert Head(weight).logits(hidden).dtype == torch.bfloat16
    assert Head(weight, softcap=30.0).logits(hidden).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Head(weight.float(), softcap=30.0).logits(hidden.float()).dtype == torch.float32


def test_gradients_reach_hidden_states_weight_and_bias() -> None:
    leaves = [tensor.requires_grad_() for tensor in (normal(3, 4), normal(7, 4, seed=1), normal(7, seed=2))]
    assert torch.autograd.gradcheck(lambda h, w, b: Head(w, b, 2.0, 0.5).logits(h), leaves)
