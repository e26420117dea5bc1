"""Check 5: a training step equals the CPU's: loss and gradients, whole and with each kind of adapter, for any rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unmask.config.model import PeftConfig
from unmask.models.loading import load_model
from unmask.training.lora import attach

# How a network is trained → the options of its adapter.
WAYS: dict[str, dict[str, bool] | None] = {
    "full": None,
    "lora": {},
    "dora": {"use_dora": True},
    "qlora": {"load_in_4bit": True},
}


def network(folder: str, way: str) -> nn.Module:
    """Return a network on the CPU, with an adapter that changes something."""
    model, options = load_model(folder, "float32").train(), WAYS[way]
    if options is None:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attach(model, PeftConfig(r=4, lora_alpha=4, **options), "")
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


# PEFT asks transformers 5 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# In bf16 a router near a tie chooses otherwise; gradients that are wrong are off by more than their norm.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_gradients"),
    [(None, 2e-5, 1e-4), (torch.bfloat16, 3e-2, 0.3)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("kind", ["plain", "ragged", "cut"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_a_step_equals_the_cpus(
    folders,
    device,
    batches,
    step_of,
    far,
    family: str,
    way: str,
    kind: str,
    dtype,
    tolerance: float,
    of_gradients: float,
) -> None:
    twin = network(folders[family], way)
    ours = copy.deepcopy(twin).to(device)
    loss, gradients = step_of(ours, batches[kind], device, dtype)
    expected, expected_gradients = step_of(twin, batches[kind], torch.device("cpu"), None)
    assert far(loss, expected) < tolerance
    assert gradients.keys() == expected_gradients.keys() != set()
    assert far(gradients, expected_gradients) < of_gradients
