"""Networks of planned models: loaded, drawn afresh or empty; and written as plain Hugging Face folders."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask import rng
from unmask.errors import ModelError, choice_problem
from unmask.machine import host_memory
from unmask.models.family import Family
from unmask.models.folders import GENERATION, find_adapter, read_generation, stored_tensors
from unmask.models.manifest import intact
from unmask.models.registry import ModelPlan, plan_folder, resolve
from unmask.models.weights import load_weights, passthrough_tensors, read_tensors, save_weights
from unmask.models.wrappers import misplaced, network_key

# Files that go with every copy of a model: generation defaults, and how images are prepared for its vision part.
_BESIDE = (GENERATION, "processor_config.json", "preprocessor_config.json")


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
    check_memory(model)
    model.to_empty(device="cpu")
    draw_weights(model, plan.family, seed)
    return model.to(device=device, dtype=torch_dtype)


def check_memory(model: nn.Module, copies: int = 1) -> None:
    """Refuse a fresh network of which the host cannot hold so many copies, before any of it is allocated."""
    need = copies * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    have = host_memory()
    if need > have:
        drawn = "" if copies == 1 else f", since each of {copies} processes draws them whole"
        raise ModelError(
            f"model.config: the network's weights take {need / 1e9:,.0f} GB{drawn}, and this machine has "
            f"{have / 1e9:,.0f} GB of memory; make it smaller"
        )


def load_model(
    name: str, dtype: str | None = None, device: Any = "cpu", adapter: str | None = None, verify: bool = True
) -> nn.Module:
    """Load a checkpoint for inference, without remote code.

    Args:
        name: a folder in the released layout, a run directory or a hub id.
        dtype: `float32`, `bfloat16` or `float16`; None = as stored.
        device: a torch device.
        adapter: folder of a LoRA adapter in PEFT's format to apply on top.
        verify: whether a run's checkpoint and adapter must be as their manifest says.

    Returns:
        the network in eval mode; its forward gives hidden states (B, L, D), `.logits` of them the logits (B, L, V).

    Raises:
        ModelError: what is missing, cut short, damaged or not supported.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {choice_problem(dtype, ('float32', 'bfloat16', 'float16'))}")
    plan = plan_folder(name, "checkpoint")
    for note in plan.notes:
        warnings.warn(note, stacklevel=2)
    adapter_folder = None if adapter is None else find_adapter(adapter)
    with intact(plan.folder, verify), intact(adapter_folder, verify):
        model = build_model(plan, dtype, device)
        if adapter_folder is not None:
            apply_adapter(model, adapter_folder)
    return model.eval()


def apply_adapter(model: nn.Module, folder: str | Path) -> None:
    """Attach a saved LoRA adapter to a network, or raise ModelError; imports PEFT, which takes seconds.

    What its generation_config.json says goes over what the network's said.
    """
    from unmask.models.lora.attach import load_adapter

    load_adapter(model, folder)
    values = {**getattr(model, "generation", {}), **read_generation(find_adapter(folder))}
    model.generation = values  # pyright: ignore[reportArgumentType]


def merged_model(plan: ModelPlan, adapter: str, dtype: str | None) -> nn.Module:
    """Load a model and merge the adapter of a folder into its weights, summed in fp32 and rounded once to `dtype`."""
    from unmask.models.lora.attach import merge_adapter

    model, wanted = build_model(plan, None), None if dtype is None else getattr(torch, dtype)
    apply_adapter(model, adapter)
    merge_adapter(model, wanted)
    return model if wanted is None else model.to(wanted)


def save_model(model: nn.Module, plan: ModelPlan, folder: Path) -> None:
    """Write the weights, what a checkpoint passes through beside them, and `write_config`'s files.

    An adapter that was merged into the weights has its say in generation_config.json.
    """
    passthrough = passthrough_tensors(plan.folder, plan.family.files)
    save_weights(chain(model.state_dict().items(), passthrough), folder)
    write_config(plan, str(next(model.parameters()).dtype).removeprefix("torch."), folder)
    generation: Any = getattr(model, "generation", None)
    if generation and plan.folder is not None and generation != read_generation(plan.folder):
        write_generation(generation, folder)


def unwrap_weights(plan: ModelPlan, folder: Path) -> ModelPlan:
    """Write a checkpoint whose tensors have a wrapper's names to an empty folder under the network's; return its plan.

    Raises:
        ModelError: there is nothing to take off, or two tensors would get one name.
    """
    assert plan.folder is not None
    with torch.device("meta"):
        network = empty_network(plan.family, plan.config).state_dict()
    files = plan.family.files

    def fits(key: str) -> bool:
        return files.holds(key, network)

    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    for key in stored_tensors(plan.folder):
        name = network_key(key, fits)
        if name is None:
            why = misplaced([key], fits) or f"tensor {key!r} has no place in this network, with or without a prefix"
            raise ModelError(f"--strip-prefix: {plan.folder}: {why}")
        if (other := sources.setdefault(name, key)) != key:
            raise ModelError(
                f"--strip-prefix: {plan.folder} has {name!r} twice, as {other!r} and as {key!r}; save one network alone"
            )
        names[key] = name
    if all(key == name for key, name in names.items()):
        raise ModelError(f"--strip-prefix: the tensors of {plan.folder} have no wrapper's prefix; leave it out")
    save_weights(((names[key], tensor) for key, tensor in read_tensors(plan.folder)), folder)
    for name in _BESIDE:
        if (plan.folder / name).is_file():
            (folder / name).write_bytes((plan.folder / name).read_bytes())
    return replace(plan, folder=folder)


def write_config(plan: ModelPlan, dtype: str, folder: Path) -> None:
    """Write config.json as it was read, with the dtype of the weights in it, and the files that go with it."""
    values = {key: value for key, value in plan.config_json.items() if key != "dtype"} | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in _BESIDE:
        if plan.folder is not None and (plan.folder / name).is_file():
            (folder / name).write_bytes((plan.folder / name).read_bytes())


def write_generation(values: Mapping[str, Any], folder: Path) -> None:
    """Write a generation_config.json."""
    (folder / GENERATION).write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
