"""Fresh adapter weights as a function of (seed, name): the same on any number of ranks, whatever else is drawn."""

from __future__ import annotations

import math

import torch
from torch import nn

from unmask.rng import key


@torch.no_grad()
def draw_adapter(model: nn.Module, seed: int) -> None:
    """Draw every `lora_A` uniformly within ±1/√inputs, as PEFT does; `lora_B` stays zero, so that nothing changes yet.

    Args:
        model: an adapted network; adapters on the meta device are left alone.
        seed: the run's seed.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A" not in name or parameter.is_meta:
            continue
        generator = torch.Generator().manual_seed(key(seed, f"adapter/init/{name}") % 2**32)
        bound = 1 / math.sqrt(parameter.shape[-1])
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
