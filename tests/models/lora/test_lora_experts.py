"""LoRA on stacked experts: the grouped computation against W + s · BA written out, and PEFT's layout of the file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.models.diffusion_gemma.model import gelu
from unmask.models.experts import Experts, local_dispatch
from unmask.models.lora.experts import AdaptedExperts, from_file, to_file

EXPERTS, WIDTH, HIDDEN = 5, 16, 12
BOTH = ("gate_up_proj", "down_proj")


def adapted(targets=BOTH, rank: int = 3, scaling: float = 0.7, seed: int = 0, dtype=torch.float32) -> AdaptedExperts:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(EXPERTS, WIDTH, HIDDEN, gelu)
    for parameter in experts.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        parameter.requires_grad_(False)
    module = AdaptedExperts(experts, targets, rank, scaling)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def dense(module: AdaptedExperts, rows_MD: Tensor, counts: list[int]) -> Tensor:
    """The textbook formula: W_e + s · B_e A_e built for each expert, applied to its rows."""

    def weight(name: str, expert: int) -> Tensor:
        base_OI = getattr(module.base_layer, name)[expert]
        if name not in module.lora_A:
            return base_OI
        return base_OI + module.scaling * module.lora_B[name][expert] @ module.lora_A[name][expert]

    parts = []
    for expert, part in enumerate(rows_MD.split(counts)):
        gate, up = (part @ weight("gate_up_proj", expert).T).chunk(2, dim=-1)
        parts.append((F.gelu(gate, approximate="tanh") * up) @ weight("down_proj", expert).T)
    return torch.cat(parts)


@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(0, 6), min_size=EXPERTS, max_size=EXPERTS).filter(any),
    rank=st.sampled_from([1, 3, 4, 8]),
    targets=st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]),
)
def test_values_and_gradients_are_those_of_the_dense_formula(counts: list[int], rank: int, targets: tuple) -> None:
    """Ranks of 4 and 8 take the grouped kernel in fp32, the others a matmul an expert; experts without rows too."""
    module = adapted(targets, rank)
    rows_MD = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(targets)
    found, expected = module(rows_MD, torch.tensor(counts)), dense(module, rows_MD, counts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((found * weights).sum(), [rows_MD, *trained])
    theirs = torch.autograd.grad((expected * weights).sum(), [rows_MD, *trained])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing() -> None:
    base = adapted().base_layer
    fresh = AdaptedExperts(base, BOTH, 4, 1.0)
    rows_MD, counts_E = torch.randn(9, WIDTH), torch.tensor([2, 0, 3, 4, 0])
    assert torch.equal(fresh(rows_MD, counts_E), base(rows_MD, counts_E))


def test_the_dispatch_takes_adapted_experts() -> None:
    module = adapted()
    hidden_ND = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    experts_NT = torch.tensor([[0, 4], [1, 2], [4, 0], [2, 3], [3, 1], [0, 1], [4, 3]])
    mixed_ND = local_dispatch(hidden_ND, experts_NT, torch.full((7, 2), 0.5), module)
    for token in range(7):
        counts = [[0] * e + [1] + [0] * (EXPERTS - 1 - e) for e in experts_NT[token].tolist()]
        expected = sum(dense(module, hidden_ND[token : token + 1], one) for one in counts) / 2
        torch.testing.assert_close(mixed_ND[token : token + 1], expected, atol=1e-5, rtol=1e-5)


def test_merging_is_exact_to_rounding() -> None:
    rows_MD, counts = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)), [2, 0, 3, 4, 0]
    module = adapted()
    expected = module(rows_MD, torch.tensor(counts))
    merged = module.merged()
    assert type(merged) is Experts
    torch.testing.assert_close(merged(rows_MD, torch.tensor(counts)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_bf16_base_is_summed_in_fp32_and_rounded_once(dtype) -> None:
    module = adapted(BOTH[1:], dtype=torch.bfloat16)
    base_EDI = module.base_layer.down_proj.detach().clone()
    update_EDI = torch.einsum("eor,eri->eoi", module.lora_B["down_proj"], module.lora_A["down_proj"])
    expected = (base_EDI.float() + module.scaling * update_EDI).to(dtype or torch.bfloat16)
    merged = module.merged(dtype)
    torch.testing.assert_close(merged.down_proj.data, expected, atol=1e-6, rtol=1e-6)
    assert merged.gate_up_proj.dtype == torch.bfloat16  # not adapted, so not touched


def test_the_layout_of_the_file_is_peft_s() -> None:
    """The delta that PEFT's own wrapper makes of our matrices is ours."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    module = adapted()
    holder = torch.nn.ModuleDict({"experts": Experts(EXPERTS, WIDTH, HIDDEN, gelu)})
    for parameter in holder.parameters():
        parameter.data.zero_()
    config = LoraConfig(r=3, lora_alpha=21, target_modules=[], target_parameters=[f"experts.{name}" for name in BOTH])
    wrapper: Any = get_peft_model(holder, config).base_model.model.get_submodule("experts")  # pyright: ignore
    for name in reversed(BOTH):  # the last target is the outermost wrapper
        assert isinstance(wrapper, ParamWrapper) and wrapper.parameter_name == name
        for side in ("lora_A", "lora_B"):
            stacked = getattr(module, side)[name]
            theirs = getattr(wrapper, side)["default"].weight
            assert to_file(side, stacked).shape == theirs.shape
            assert torch.equal(from_file(side, to_file(side, stacked), EXPERTS), stacked)
            theirs.data = to_file(side, stacked.data).contiguous()
        expected = 7 * torch.einsum("eor,eri->eoi", module.lora_B[name], module.lora_A[name])
        torch.testing.assert_close(wrapper.get_delta_weight("default"), expected, atol=1e-5, rtol=1e-5)
        wrapper = wrapper.base_layer
