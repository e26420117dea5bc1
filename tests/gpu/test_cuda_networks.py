"""Networks, kernels and losses on a CUDA device against the same on the CPU, values and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from unmask.config.distributed import DistributedConfig
from unmask.config.sampler import SamplerConfig
from unmask.distributed.runtime import Runtime, flex_available, set_switches
from unmask.models.layers import attend, prepare_mask
from unmask.models.loading import load_model
from unmask.ops.head import Head
from unmask.ops.linear_cross_entropy import linear_cross_entropy
from unmask.rng import NoiseStream
from unmask.sampling.generate import generate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_nothing(fixtures: Path, cuda, batch, step_of, far, dtype):
    found = []
    for checkpointing in (False, True):
        model = load_model(str(fixtures / "diffusion_gemma_step"), "float32", cuda)
        for module in model.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = checkpointing
        found.append(step_of(model, batch, cuda, dtype if dtype == torch.bfloat16 else None))
    assert far(found[1][0], found[0][0]) < 1e-6
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
def test_flex_attention_equals_sdpa(cuda, far, kind, grouped, dtype):
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
        assert far(flex, sdpa) < bound


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_equals_logits_for_all(cuda, far, dtype, softcap):
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
    assert far(found, expected) < bound
    for one, other in zip(grads, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert far(one, other) < bound


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_loss_waits_for_the_device_nowhere(fixtures: Path, cuda, batch, objective_of):
    for folder in ("llada_tiny", "diffusion_gemma_step"):
        model = load_model(str(fixtures / folder), "float32", cuda)
        objective = objective_of(model.config)
        noisy = objective.corrupt(batch, NoiseStream(3)).to(cuda)
        with torch.autocast("cuda", torch.bfloat16):
            objective.loss(model, noisy)  # kernels are compiled and handles made
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("error")
                objective.loss(model, noisy).total.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own
# Where the rounding of a kernel decides between two experts, a token goes to another one.
@pytest.mark.parametrize(
    ("family", "tolerance", "of_gradients"), [("llada", 5e-3, 5e-2), ("diffusion_gemma", 3e-2, 0.3)]
)
def test_compiled_blocks_change_nothing(
    folders, cuda, batches, step_of, far, family: str, tolerance: float, of_gradients: float
) -> None:
    eager, compiled = (load_model(folders[family], "float32", cuda).train() for _ in range(2))
    set_switches(compiled, DistributedConfig(compile=True), Runtime(cuda, torch.bfloat16))
    for batch in batches.values():  # of other lengths than those that were compiled for
        expected, found = (step_of(model, batch, cuda, torch.bfloat16) for model in (eager, compiled))
        assert far(found[0], expected[0]) < tolerance
        assert found[1].keys() == expected[1].keys() and far(found[1], expected[1]) < of_gradients
    sampler = SamplerConfig(steps=8, max_new_tokens=16)
    with torch.autocast("cuda", torch.bfloat16):  # as a run has answers sampled
        answers = [generate(compiled.eval(), [[5, 6, 7], [9, 10, 11, 12]], sampler=sampler) for _ in range(2)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]
