"""Networks, kernels and losses on a CUDA device against the same on the CPU, values and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from unmask.batch import Batch
from unmask.config.distributed import DistributedConfig
from unmask.distributed.runtime import Runtime, flex_available, set_switches
from unmask.models.experts import grouped_kernel, grouped_linear
from unmask.models.layers import attend, prepare_mask
from unmask.models.loading import load_model
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.ops.head import Head
from unmask.ops.linear_cross_entropy import linear_cross_entropy
from unmask.rng import NoiseStream

pytestmark = pytest.mark.gpu


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def step_of(
    batch: Batch, model, objective, device: torch.device, dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    noisy = objective.corrupt(batch, NoiseStream(3)).to(device)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = objective.loss(model, noisy).total
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, grads


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_a_step_equals_the_cpu_step(fixtures: Path, cuda, batch, family, dtype, tolerance):
    folder = fixtures / ("llada_tiny" if family == "llada" else "diffusion_gemma_step")
    ours, twin = load_model(str(folder), "float32", cuda), load_model(str(folder), "float32")
    config = twin.config
    objective = (
        MDLM(config.mask_token_id, eps=0.2)
        if family == "llada"
        else CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id)
    )
    loss, grads = step_of(batch, ours, objective, cuda, dtype)
    expected, expected_grads = step_of(batch, twin, objective, torch.device("cpu"), None)
    assert relative(loss, expected) < tolerance
    assert grads.keys() == expected_grads.keys()
    total = sum(float((grads[n].cpu() - expected_grads[n]).double().square().sum()) for n in grads) ** 0.5
    norm = sum(float(g.double().square().sum()) for g in expected_grads.values()) ** 0.5
    assert total / norm < tolerance * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_nothing(fixtures: Path, cuda, batch, dtype):
    found = []
    for checkpointing in (False, True):
        model = load_model(str(fixtures / "diffusion_gemma_step"), "float32", cuda)
        for module in model.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = checkpointing
        config = model.config
        objective = CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id)
        found.append(step_of(batch, model, objective, cuda, dtype if dtype == torch.bfloat16 else None))
    assert relative(found[1][0], found[0][0]) < 1e-6
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-3, atol=1e-5)


def test_the_golden_logits(fixtures: Path, cuda):
    reference = load_file(fixtures / "llada_tiny" / "expected.safetensors")
    model = load_model(str(fixtures / "llada_tiny"), "float32", cuda)
    ids = reference["forward.input_ids"].to(cuda)
    for case in ("forward", "left_padded", "right_padded"):
        mask = reference.get(f"{case}.attention_mask")
        with torch.no_grad():
            logits = model.logits(model(ids, attention_mask=None if mask is None else mask.to(cuda))).cpu()
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()
        # An H100 has come to 2.02e-4 at one of 49,152 logits, of up to 12.7, where the CPU's bound is 2e-4.
        torch.testing.assert_close(logits[keep], reference[f"{case}.logits"][keep], atol=4e-4, rtol=0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["keys", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_equals_sdpa(cuda, kind, grouped, dtype):
    assert flex_available(cuda)
    generator = torch.Generator(cuda).manual_seed(1)
    rows, heads, length, size = 2, 4, 200, 64
    shapes = [(rows, heads, length, size)] + [(rows, 2 if grouped else heads, length, size)] * 2
    tensors = [torch.randn(s, generator=generator, device=cuda, dtype=dtype).requires_grad_() for s in shapes]
    mask = torch.ones(rows, 1, 1 if kind == "keys" else length, length, dtype=torch.bool, device=cuda)
    mask[1, ..., 150:] = False
    if kind == "pairs":
        mask[0, 0, :90, 90:] = False
        mask[0, 0, 90:, :90] = False
    found = []
    for kernel in ("flex", "sdpa"):
        out = attend(*tensors, prepare_mask(mask, kernel, rows, length, length))
        found.append((out, *torch.autograd.grad(out.float().square().sum(), tensors)))
    bound = 2e-3 if dtype == torch.float32 else 2e-2
    for flex, sdpa in zip(*found, strict=True):
        assert relative(flex, sdpa) < bound


def test_grouped_experts_equal_a_matmul_an_expert(cuda):
    generator = torch.Generator(cuda).manual_seed(2)
    rows = torch.randn(300, 64, generator=generator, device=cuda, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(5, 96, 64, generator=generator, device=cuda, dtype=torch.bfloat16).requires_grad_()
    counts = torch.tensor([100, 0, 7, 150, 43], device=cuda)
    assert grouped_kernel(rows, weight)
    found = grouped_linear(rows, weight, counts)
    parts = rows.split(counts.tolist())
    expected = torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])
    assert relative(found, expected) < 1e-2
    upstream = torch.randn(found.shape, generator=generator, device=cuda, dtype=torch.bfloat16)
    for one, other in zip(
        torch.autograd.grad(found, [rows, weight], upstream),
        torch.autograd.grad(expected, [rows, weight], upstream),
        strict=True,
    ):
        assert relative(one, other) < 1e-2


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_equals_logits_for_all(cuda, dtype, softcap):
    generator = torch.Generator(cuda).manual_seed(4)
    rows, width, vocabulary = 700, 128, 70_000
    hidden = torch.randn(rows, width, generator=generator, device=cuda).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator, device=cuda) * 0.1).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=cuda)
    weights = torch.rand(rows, generator=generator, device=cuda) * (torch.arange(rows, device=cuda) % 5 > 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, _ = linear_cross_entropy(
            hidden, Head(weight, softcap=softcap), targets, weights, chunk_logits=100 * vocabulary
        )
        grads = torch.autograd.grad(found, [hidden, weight])
    grown = torch.cuda.max_memory_allocated() - before
    # The head's gradient, a chunk of 100 rows and its temporaries; never 700 rows of logits.
    assert grown < weight.numel() * 4 + 4 * 100 * vocabulary * 4
    logits = hidden.double() @ weight.double().t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative(found, expected) < bound
    for one, other in zip(grads, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert relative(one, other) < bound


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_loss_waits_for_the_device_nowhere(fixtures: Path, cuda, batch):
    for folder in ("llada_tiny", "diffusion_gemma_step"):
        model = load_model(str(fixtures / folder), "float32", cuda)
        config = model.config
        objective = (
            MDLM(config.mask_token_id, eps=0.2)
            if folder == "llada_tiny"
            else CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id)
        )
        noisy = objective.corrupt(batch, NoiseStream(3)).to(cuda)
        with torch.autocast("cuda", torch.bfloat16):
            objective.loss(model, noisy)  # kernels are compiled and handles made
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("error")
                objective.loss(model, noisy).total.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own
def test_compiled_blocks_change_nothing(fixtures: Path, cuda, batch):
    found = []
    for compiled in (False, True):
        model = load_model(str(fixtures / "llada_tiny"), "float32", cuda)
        set_switches(model, DistributedConfig(compile=compiled), Runtime(cuda, torch.bfloat16))
        objective = MDLM(model.config.mask_token_id, eps=0.2)
        found.append(step_of(batch, model, objective, cuda, torch.bfloat16))
    assert relative(found[1][0], found[0][0]) < 5e-3
    for name, grad in found[0][1].items():
        assert relative(found[1][1][name], grad) < 5e-2, name
