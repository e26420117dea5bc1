"""Norm and rotation, values and gradients, against the formulas as papers have them."""

from __future__ import annotations

import pytest
import torch

from unmask.models.layers import RMSNorm, rotary_tables, rotate

ROWS, LENGTH, HEADS, SIZE = 2, 5, 3, 8


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_norm_is_the_formula_in_values_and_gradients(dtype: torch.dtype, frozen: str) -> None:
    norm = RMSNorm(SIZE, 1e-3)
    assert norm.weight is not None
    with torch.no_grad():
        norm.weight.copy_(1 + normal(SIZE, seed=0))
    norm.weight.requires_grad_(frozen != "weight")
    hidden = (10 ** normal(ROWS, LENGTH, 1, seed=1) * normal(ROWS, LENGTH, SIZE, seed=2)).to(dtype)
    hidden.requires_grad_(frozen != "input")
    probe = normal(ROWS, LENGTH, SIZE, seed=3).to(dtype)
    wanted = [tensor for tensor in (hidden, norm.weight) if tensor.requires_grad]
    found = norm(hidden, dtype)
    assert found.dtype == dtype
    wide = hidden.double()
    expected = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-3) * norm.weight.double()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected.to(dtype), rtol=limit, atol=limit)
    with torch.autocast("cpu", torch.bfloat16):  # as where backward is called inside it; nothing here may go by it
        gradients = torch.autograd.grad(found, wanted, probe)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, wanted, probe.double()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


def test_a_norm_of_zeros_has_a_finite_gradient() -> None:
    norm, hidden = RMSNorm(SIZE, 1e-6), torch.zeros(1, 1, SIZE, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(hidden).sum(), hidden)
    torch.testing.assert_close(gradient, torch.full((1, 1, SIZE), 1e3))


@pytest.mark.parametrize("pairs", [None, 1])
def test_rotation_is_the_formula_in_values_and_gradient(pairs: int | None) -> None:
    cos, sin = rotary_tables(torch.tensor([[0, 1, 2, 7, 500]]), SIZE, 50.0, pairs)
    heads = normal(ROWS, LENGTH, HEADS, SIZE, seed=4).transpose(1, 2).requires_grad_()
    pairs_BHLP = torch.complex(*heads.double().chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())
    expected = torch.cat((pairs_BHLP.real, pairs_BHLP.imag), dim=-1).float()
    probe = normal(ROWS, HEADS, LENGTH, SIZE, seed=5)
    torch.testing.assert_close(rotate(heads, cos, sin), expected)
    ours, theirs = (
        torch.autograd.grad(turned, heads, probe, retain_graph=True) for turned in (rotate(heads, cos, sin), expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_trained_norm_over_a_narrower_network_is_not_rounded_first() -> None:
    """As norms that an adapter trains whole: fp32 over a bf16 base."""
    norm, hidden = RMSNorm(SIZE, 1e-3), normal(ROWS, LENGTH, SIZE, seed=1).bfloat16()
    assert norm.weight is not None
    with torch.no_grad():
        norm.weight.add_(1e-3 * normal(SIZE, seed=0))  # less than bf16 tells apart at 1
    expected = torch.nn.functional.rms_norm(hidden.float(), (SIZE,), norm.weight, 1e-3)
    assert torch.equal(norm(hidden), expected)
    assert torch.equal(norm(hidden, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_rotation_is_computed_in_fp32_and_rounded_once(dtype: torch.dtype | None) -> None:
    cos, sin = rotary_tables(torch.tensor([[0, 1, 2, 7, 500]]), SIZE, 50.0)
    heads = normal(ROWS, LENGTH, HEADS, SIZE, seed=4).transpose(1, 2).requires_grad_()
    probe = normal(ROWS, HEADS, LENGTH, SIZE, seed=5).to(dtype or torch.float32)
    turned = rotate(heads, cos, sin, dtype)
    assert torch.equal(turned, rotate(heads, cos, sin).to(dtype or torch.float32))
    (gradient,) = torch.autograd.grad(turned, heads, probe)
    torch.testing.assert_close(gradient, rotate(probe.float(), cos, -sin))
    with torch.no_grad():
        narrow = heads.bfloat16()
        assert torch.equal(rotate(narrow, cos, sin), rotate(narrow.float(), cos, sin).bfloat16())
