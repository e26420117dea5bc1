"""Networks of planned models: with a checkpoint's weights, with fresh ones, or with none yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask import rng
from unmask.errors import ModelError, choice_problem
from unmask.models.family import Family
from unmask.models.folders import read_generation
from unmask.models.registry import ModelPlan, plan_folder, resolve
from unmask.models.weights import load_weights


def empty_network(family: Family, config: Any) -> nn.Module:
    """Return the network of a configuration on torch's default device, its weights undefined."""
    return resolve(family.network)(config)


def draw_weights(model: nn.Module, family: Family, seed: int) -> None:
    """Draw a network's weights in place, as a function of `seed` alone."""
    resolve(family.initialise)(model, torch.Generator().manual_seed(rng.key(seed, "model/init") % 2**32))


def build_model(plan: ModelPlan, dtype: str | None, device: Any = "cpu", seed: int = 42) -> nn.Module:
    """Load a planned model's weights, or draw them for a fresh one from `seed`.

    A loaded network has the values of its generation_config.json as `model.generation`, which sampling starts from.

    Args:
        plan: from `plan_model` or `plan_folder`.
        dtype: `float32`, `bfloat16` or `float16`; None = as stored (float32 for a fresh model).
        device: where the parameters go.
        seed: for fresh weights only.
    """
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config)
    if plan.folder is not None:
        load_weights(model, plan.folder, torch_dtype, device, plan.family.files)
        model.generation = read_generation(plan.folder)  # pyright: ignore[reportArgumentType]
        return model
    model.to_empty(device="cpu")
    draw_weights(model, plan.family, seed)
    return model.to(device=device, dtype=torch_dtype)


def load_model(name: str, dtype: str | None = None, device: Any = "cpu", adapter: str | None = None) -> nn.Module:
    """Load a checkpoint for inference, without remote code.

    Args:
        name: a folder in the released layout, a run directory or a hub id.
        dtype: `float32`, `bfloat16` or `float16`; None = as stored.
        device: a torch device.
        adapter: folder of a LoRA adapter in PEFT's format to apply on top.

    Returns:
        the network in eval mode; its forward gives hidden states (B, L, D), `.logits` of them the logits (B, L, V).

    Raises:
        ModelError: what is missing, cut short or not supported.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {choice_problem(dtype, ('float32', 'bfloat16', 'float16'))}")
    model = build_model(plan_folder(name, "checkpoint"), dtype, device)
    if adapter is not None:
        apply_adapter(model, adapter)
    return model.eval()


def apply_adapter(model: nn.Module, folder: str | Path) -> None:
    """Attach a saved LoRA adapter to a network, or raise ModelError; imports PEFT, which takes seconds."""
    from unmask.models.lora.attach import load_adapter

    load_adapter(model, folder)
