"""A plain Hugging Face folder: weights, config.json, tokenizer and chat template, as every loader reads it."""

from __future__ import annotations

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from unmask.models.registry import ModelPlan
from unmask.models.weights import passthrough_tensors, save_weights

# Files that go with every copy of a model: generation defaults, and how images are prepared for its vision part.
BESIDE = ("generation_config.json", "processor_config.json", "preprocessor_config.json")


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
