"""Compiled blocks compute what the network as it stands computes, and are compiled a few times, whatever the lengths.

On CPUs by `aot_eager`: PyTorch's tracing and its backward pass, without the kernels that Triton would make.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.training.test_flops import batch
from unmask.config.model import PeftConfig
from unmask.config.sampler import SamplerConfig
from unmask.distributed import runtime
from unmask.distributed.expert_parallel import expert_dispatch
from unmask.models.loading import load_model
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.rng import NoiseStream
from unmask.sampling.generate import generate
from unmask.training.lora import attach

LENGTHS = (40, 24, 33, 56, 48, 17)
pytestmark = pytest.mark.timeout(600)  # compiling takes a busy machine minutes
CASES = [
    ("llada_tiny", "full", False),
    pytest.param("llada_tiny", "lora", True, marks=pytest.mark.slow),
    pytest.param("diffusion_gemma_step", "full", True, marks=pytest.mark.slow),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """What is compiled while a test runs; parameter False: where a graph may break, else anything else is an error."""
    from torch._dynamo.backends.debugging import aot_eager

    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return aot_eager(graph, inputs)

    compiled = partial(torch.compile, backend=backend, fullgraph=getattr(request, "param", True))
    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


def network(fixtures: Path, name: str, trained: str, checkpointing: bool) -> Any:
    model: Any = load_model(str(fixtures / name), "float32")
    if trained == "lora":
        attach(model, PeftConfig(r=4), "")
    for module in model.modules():
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = checkpointing
    return model.train()


def compile_all(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "activation_checkpointing"):
            runtime.compile_blocks(module)


def gradients(model: Any, objective: Any, length: int) -> tuple[float, torch.Tensor]:
    """The loss of two rows of a length under bf16 autocast, and all gradients."""
    model.zero_grad()
    noisy = objective.corrupt(batch(2, length, 14), NoiseStream(length))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(model, noisy).total
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "trained", "checkpointing"), CASES)
def test_compiled_equals_eager(fixtures: Path, graphs: list[Any], name: str, trained: str, checkpointing: bool) -> None:
    model = network(fixtures, name, trained, checkpointing)
    config, compiled = model.config, copy.deepcopy(model)
    compile_all(compiled)
    objective: Any = MDLM(config.mask_token_id)
    if name != "llada_tiny":
        objective = CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id, self_conditioning_p=1)
    counts = []
    for length in LENGTHS:
        (loss, expected), (again, found) = (gradients(each, objective, length) for each in (model, compiled))
        assert again == pytest.approx(loss, rel=1e-3)
        assert (found - expected).norm() < 0.02 * expected.norm()  # bf16 rounds to 0.4 %
        counts.append(len(graphs))
    kinds = len(set(config.layer_types)) if name != "llada_tiny" else 1
    roles = 3 if name != "llada_tiny" else 1  # encoder, decoder, and the decoder's first pass without gradient
    assert counts[-1] <= 3 * kinds * roles
    assert counts[1:] == [counts[1]] * 5  # further lengths compile nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graphs", [False], indirect=True)
def test_the_exchange_of_tokens_stays_outside(fixtures: Path, graphs: list[Any]) -> None:
    """Experts in a group of one rank: graphs before and after the exchange and of the experts, and the same result."""
    model = network(fixtures, "diffusion_gemma_step", "full", False)
    config, compiled = model.config, copy.deepcopy(model)
    objective = CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id, self_conditioning_p=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    try:
        for layer in compiled.stack.layers:
            layer.dispatch = expert_dispatch(group)
        compile_all(compiled)
        (loss, expected), (again, found) = (gradients(each, objective, 40) for each in (model, compiled))
    finally:
        dist.destroy_process_group()
    assert again == pytest.approx(loss, rel=1e-3)
    assert (found - expected).norm() < 0.02 * expected.norm()
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert any("grouped_mm" in name for name in called) and not any("all_to_all" in name for name in called)
    with_experts = [graph for graph in graphs if "grouped_mm" in str(graph.graph)]
    assert all("topk" not in str(graph.graph) for graph in with_experts)  # the router is in a graph of its own


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_answers_of_compiled_blocks(fixtures: Path, graphs: list[Any], cache: Any) -> None:
    """The same tokens, and all layers share what is compiled: with a cache, too, which is another in each."""
    model = network(fixtures, "llada_tiny", "full", False).eval()
    compiled = copy.deepcopy(model)
    compile_all(compiled)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    sampler = SamplerConfig(steps=8, max_new_tokens=16, block_size=8, cache=cache)
    expected, found = (generate(each, prompts, sampler=sampler) for each in (model, compiled))
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    ways = len(graphs)
    generate(compiled, prompts, sampler=sampler)
    assert len(graphs) == ways <= 6 and model.config.n_layers > 1
