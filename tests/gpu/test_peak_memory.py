"""Check 7: a training step takes the memory that `--dry-run` counts: within a tenth at released widths on a GPU."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask.config import RunConfig, config_from_mapping
from unmask.distributed.runtime import build_runtime
from unmask.doctor.trial import ragged_batch
from unmask.models.loading import empty_network
from unmask.models.registry import ModelPlan, plan_model
from unmask.objectives.registry import build_objective
from unmask.rng import NoiseStream
from unmask.training.estimate import estimate_memory
from unmask.training.optim import build_optimizer
from unmask.training.step import train_step

RELEASED = {"llada": "llada_8b_instruct", "diffusion_gemma": "diffusiongemma_26b_a4b_it"}
LENGTH = 256
# Released widths, of two layers; on a CPU narrow ones, of as few tokens beside the weights.
LAYERS = {
    "llada": {"n_layers": 2},
    "diffusion_gemma": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
NARROW = {
    "llada": {"d_model": 512, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 1536, "vocab_size": 4096,
              "embedding_size": 4096, "mask_token_id": 4000, "eos_token_id": 4001, "pad_token_id": 4001},
    "diffusion_gemma": {"hidden_size": 512, "intermediate_size": 384, "moe_intermediate_size": 256, "num_experts": 8,
                        "vocab_size": 4096, "head_dim": 64, "global_head_dim": 64, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "num_global_key_value_heads": 1},
}  # fmt: skip
MODES = {"llada": "mdlm", "diffusion_gemma": "block_diffusion"}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, on any device, and the most that ever were."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        for tensor in held:
            self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, freed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out


def run_config(fixtures: Path, family: str, device: torch.device, checkpointing: bool) -> RunConfig:
    values = json.loads((fixtures / RELEASED[family] / "config.json").read_text())
    changes = {**LAYERS[family], **(NARROW[family] if device.type == "cpu" else {})}
    place = values["text_config"] if "text_config" in values else values
    place.update(changes)
    return config_from_mapping(
        {
            "model": {"config": values},
            "dllm": {"mode": MODES[family]},
            "dataset": {"path_or_dataset_id": "none", "seq_length": LENGTH},
            "step_scheduler": {"global_batch_size": 1, "local_batch_size": 1, "max_steps": 2},
            "distributed": {"device": device.type, "activation_checkpointing": checkpointing},
        }
    ).config


def peak_of_a_step(config: RunConfig, plan: ModelPlan, device: torch.device) -> int:
    """Return the most bytes that were held in a second step, when the optimizer has its state."""
    with device:
        model = empty_network(plan.family, plan.config)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.02)
    runtime, optimizer = build_runtime(config.distributed), build_optimizer(config.optimizer, model)
    objective = build_objective(config.dllm, plan.config)
    batch = ragged_batch(1000, 1, LENGTH)

    def step(number: int) -> None:
        train_step(model, objective, [batch], NoiseStream(number), optimizer, runtime, 1.0)

    step(0)
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(1)
        return torch.cuda.max_memory_allocated(device)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    with LiveBytes([*model.parameters(), *model.buffers(), *state]) as counted:
        step(1)
    return counted.peak


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", RELEASED)
def test_a_step_takes_what_was_counted(fixtures: Path, device, measured, family: str, checkpointing: bool) -> None:
    config = run_config(fixtures, family, device, checkpointing)
    plan = plan_model(config.model)
    with torch.device("meta"):
        counted = estimate_memory(config, plan, empty_network(plan.family, plan.config), device)
    peak = peak_of_a_step(config, plan, device)
    total = counted.total - counted.context  # which PyTorch's allocator does not see
    parts = {name: f"{size / 1e9:.2f}" for name, size in dataclasses.asdict(counted).items()}
    measured(f"{family}, two layers: {peak / 1e9:.2f} GB at the peak, {total / 1e9:.2f} counted: {parts}")
    # Narrow networks have few weights beside what is live for a moment, which is counted as if it all were at once.
    assert total == pytest.approx(peak, rel=0.1 if device.type == "cuda" else 0.35)
