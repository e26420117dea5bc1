"""Attention of the released widths: never by SDPA's math kernel, which keeps all scores; and how long each call takes.

Check 2 of `make gpu`. On a CPU the same runs at small widths.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from unmask.batch import Batch
from unmask.config.distributed import DistributedConfig
from unmask.distributed.runtime import build_runtime
from unmask.doctor.kernels import masked_gradients_finite
from unmask.models.layers import attend
from unmask.models.loading import empty_network
from unmask.models.registry import family_named
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.rng import NoiseStream

WINDOW = 1024  # of the released sliding layers


@pytest.fixture
def network(
    fixtures: Path, gemma_values: Callable[..., dict], tiny: Any, device: torch.device
) -> Callable[..., nn.Module]:
    """Return a function that makes a random network in bf16, of a layer of each type, whose attention is trained."""

    def make(family: str) -> nn.Module:
        two = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        if device.type == "cpu":
            values = gemma_values(**two) if family == "diffusion_gemma" else tiny.model
        else:
            folder = "diffusiongemma_26b_a4b_it" if family == "diffusion_gemma" else "llada_8b_instruct"
            values = json.loads((fixtures / folder / "config.json").read_text())
            values = (
                {**values, "text_config": {**values["text_config"], **two}}
                if "text_config" in values
                else {**values, "n_layers": 2}
            )
        chosen = family_named(values, "config.json")
        with torch.device("meta"):
            model = empty_network(chosen, chosen.parse_config(values, "config.json")).bfloat16()
        model.to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator) if tensor.dim() > 1 else tensor.fill_(
                    1
                )
                tensor.requires_grad_("q_proj" in name or "k_proj" in name)
        return model

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[tuple[Tensor, ...], dict[str, Any]]]]:
    """The arguments of each call of SDPA."""
    made: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    run = F.scaled_dot_product_attention

    def recorded(*tensors: Tensor, **options: Any) -> Tensor:
        # Which kernel is taken depends on whether gradients are asked for.
        made.append((tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors), options))
        return run(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    yield made
    monkeypatch.undo()


def ragged(length: int) -> Batch:
    """Three rows of unequal length whose prompts are of unequal length."""
    position_BL = torch.arange(length)[None].expand(3, -1)
    real_BL = position_BL < torch.tensor([[length], [length - 9], [length // 2]])
    supervised_BL = real_BL & (position_BL >= torch.tensor([[length - 20], [3], [length // 4]]))
    rows, cut_B = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    return Batch(position_BL % 20 + 2, supervised_BL, real_BL, supervised_BL.sum(1), rows, 0, rows, 3, cut_B, rows)


def milliseconds(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> float:
    """Return the median time of forward and backward passes of a call."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    seconds = []
    for _ in range(5):
        for edge in (0, 1):
            if leaves[0].device.type == "cuda":
                torch.cuda.synchronize()
            if edge == 0:
                began = time.perf_counter()
                F.scaled_dot_product_attention(*leaves, **options).sum().backward()
            else:
                seconds.append(time.perf_counter() - began)
    return 1000 * sorted(seconds)[len(seconds) // 2]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_no_call_needs_the_math_kernel(network, calls, device: torch.device, family: str, capsys, monkeypatch) -> None:
    model = network(family)
    config, batch = model.config, ragged(64 if device.type == "cpu" else WINDOW + 476)
    if family == "llada":
        objective: Any = MDLM(config.mask_token_id, eps=0.2)
    else:
        objective = CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id)
    noisy = objective.corrupt(batch, NoiseStream(3)).to(device)
    objective.loss(model, noisy).total.backward()
    if family == "diffusion_gemma":
        with torch.no_grad():
            short = model.encode(
                batch.input_ids_BL[:, : 4 if device.type == "cpu" else WINDOW - 24].to(device)
            )  # causal, no mask
            model.decode(noisy.canvas_ids_KC, short)
    monkeypatch.undo()
    assert any(tensors[0].requires_grad for tensors, _ in calls)
    assert {tensors[0].shape[-1] for tensors, _ in calls} == (
        {128} if family == "llada" else {256, 512}
    ) or device.type == "cpu"
    seen = set()
    for tensors, options in calls:
        mask, causal, grouped = options["attn_mask"], options["is_causal"], options.get("enable_gqa", False)
        choice = torch._fused_sdp_choice(*tensors, mask, 0.0, causal, scale=options["scale"], enable_gqa=grouped)
        kernel = next(name for name, value in SDPBackend.__members__.items() if int(value) == choice)
        what = (
            tuple(tensors[0].shape),
            tuple(tensors[1].shape),
            None if mask is None else tuple(mask.shape),
            causal,
            kernel,
        )
        if what not in seen:
            seen.add(what)
            with capsys.disabled():
                print(f"\n{family}: queries {what[0]}, keys {what[1]}, mask {what[2]}, causal {causal}: {kernel}, "
                      f"{milliseconds(tensors, options):.2f} ms forward and backward", end="")  # fmt: skip
        assert kernel != "MATH", what


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("groups", "size"), [(8, 256), (2, 512)])
def test_released_heads_equal_fp32_on_the_cpu(device: torch.device, groups: int, size: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(2, heads, 70, size, generator=generator) for heads in (16, groups, groups)]
    exact[0] *= size**-0.5
    mask = (torch.arange(70) < torch.tensor([70, 31])[:, None])[:, None, None] if masked else None
    probe = torch.randn(exact[0].shape, generator=generator)
    found = []
    for place, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
        leaves = [tensor.to(place, dtype).requires_grad_() for tensor in exact]
        out = attend(*leaves, None if mask is None else mask.to(place), scale=1.0)
        found.append((out, *torch.autograd.grad(out, leaves, probe.to(place, dtype))))
    for ours, theirs in zip(*found, strict=True):
        error = (ours.detach().cpu().float() - theirs).norm() / theirs.norm()
        assert error < 2e-2


@pytest.mark.parametrize("length", [192, 256, 704])
def test_gradients_under_a_mask_are_numbers(device: torch.device, length: int) -> None:
    build_runtime(DistributedConfig(device=device.type))  # pyright: ignore[reportArgumentType]  # as training does
    assert masked_gradients_finite(device, length)
