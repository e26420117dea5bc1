"""A plain Hugging Face folder: weights, config.json, tokenizer and chat template, as every loader reads it."""

from __future__ import annotations

import copy
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.models.loading import apply_adapter, build_model
from unmask.models.lora.files import write_adapter_config
from unmask.models.registry import ModelPlan
from unmask.models.weights import passthrough_tensors, save_weights
from unmask.training.network import Network

# Files that go with every copy of a model: generation defaults, and how images are prepared for its vision part.
BESIDE = ("generation_config.json", "processor_config.json", "preprocessor_config.json")


def merged_model(plan: ModelPlan, adapter: str | None, dtype: str | None) -> nn.Module:
    """Load a model and merge an adapter into its weights, summed in fp32 and rounded once, a layer at a time.

    Args:
        plan: the model.
        adapter: folder of a LoRA adapter; None merges none.
        dtype: dtype of the weights; None = as stored.
    """
    if adapter is None:
        return build_model(plan, dtype)
    from unmask.models.lora.attach import merge_adapter  # PEFT takes seconds to load

    model, wanted = build_model(plan, None), None if dtype is None else getattr(torch, dtype)
    apply_adapter(model, adapter)
    merge_adapter(model, wanted)
    return model if wanted is None else model.to(wanted)


def save_model(model: nn.Module, plan: ModelPlan, folder: Path) -> None:
    """Write the weights, config.json as it was read with the dtype of the weights in it, and the files beside it."""
    passthrough = passthrough_tensors(plan.folder, plan.family.files)
    save_weights(chain(model.state_dict().items(), passthrough), folder)
    write_config(plan, str(next(model.parameters()).dtype).removeprefix("torch."), folder)


def write_config(plan: ModelPlan, dtype: str, folder: Path) -> None:
    """Write config.json as it was read, with the dtype of the weights in it, and the files that go with it."""
    kept = {key: value for key, value in plan.config_json.items() if key != "dtype"}
    (folder / "config.json").write_text(json.dumps({**kept, "torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    source = plan.folder
    for name in BESIDE:
        if source is not None and (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def write_tokenizer(tokenizer: Any, template: str, folder: Path) -> None:
    """Save a tokenizer with the chat template that training used, so that inference prompts alike."""
    own = copy.copy(tokenizer)
    own.chat_template = template
    own.save_pretrained(folder)


def files_beside(network: Network, tokenizer: Any, template: str, run_config: str) -> dict[str, bytes]:
    """Return the content of the files that belong to each checkpoint of a run beside tensors, by their paths in it.

    Args:
        network: the run's.
        tokenizer: saved with `template`, Jinja source of the chat template, so that inference prompts as training did.
        run_config: YAML of the run.
    """
    with tempfile.TemporaryDirectory(prefix="unmask-beside-") as name:
        folder = Path(name)
        if network.adapter is not None:
            write_adapter_config(network.adapter, network.adapter_config, folder)
        else:
            write_config(network.plan, network.dtype, folder)
        write_tokenizer(tokenizer, template, folder)
        (folder / "config.yaml").write_text(run_config, encoding="utf-8")
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
