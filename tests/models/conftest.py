"""Small networks: the reference checkpoint, and random ones with chosen fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise
from unmask.models.loading import load_model


@pytest.fixture(scope="session")
def saved_numbers() -> Callable[[Callable[[], Tensor]], tuple[Tensor, int]]:
    """Return a function that runs a forward pass and returns its result and how many numbers it saves for backward."""

    def run(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
        count = 0

        def add(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
            return forward(), count

    return run


@pytest.fixture(scope="session")
def reference_folder(fixtures: Path) -> Path:
    return fixtures / "llada_tiny"


@pytest.fixture
def reference_model(reference_folder: Path) -> LLaDA:
    model = load_model(str(reference_folder))
    assert isinstance(model, LLaDA)
    return model


@pytest.fixture(scope="session")
def network() -> Callable[..., LLaDA]:
    """Return a function that makes a random network; biases and norms are random too, so that none can hide."""

    def make(seed: int = 1, **fields) -> LLaDA:
        sizes = {"d_model": 24, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 40, "max_sequence_length": 64}
        ids = {"vocab_size": 30, "embedding_size": 32, "mask_token_id": 29, "eos_token_id": 28, "pad_token_id": 27}
        model = LLaDA(LLaDAConfig(**(sizes | ids | {"rope_theta": 100.0} | fields)))
        generator = torch.Generator().manual_seed(seed)
        initialise(model, generator)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name or "ln_f" in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        return model

    return make
