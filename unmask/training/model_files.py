"""What a training checkpoint holds of the model: the whole network, or the adapter where only that is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from unmask.config.model import PeftConfig
from unmask.models.registry import ModelPlan
from unmask.models.weights import carried_tensors, copy_weights, save_weights

# Files that go with every copy of a model: generation defaults, and how images are prepared for its vision part.
BESIDE = ("generation_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """How a run's model goes to and from a checkpoint folder.

    Attributes:
        write: writes a folder that inference tools read as it is.
        read: puts such a folder's weights back into the model.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], None]


def model_files(
    model: nn.Module, plan: ModelPlan, peft: PeftConfig | None, tokenizer: Any, template: str, run_config: str
) -> ModelFiles:
    """Prepare a model for its run (adapters are attached here) and say how it is saved.

    Args:
        model: the loaded network.
        plan: where it came from.
        peft: the adapter to train; None trains the network.
        tokenizer: saved beside the weights, with the template that training used.
        template: Jinja source of the chat template.
        run_config: YAML of the run, saved as config.yaml.
    """

    def write_common(folder: Path) -> None:
        write_tokenizer(tokenizer, template, folder)
        (folder / "config.yaml").write_text(run_config, encoding="utf-8")

    if peft is not None:
        from unmask.models.lora.files import read_adapter, write_adapter
        from unmask.training.lora import attach

        config = attach(model, peft, plan.source)

        def write_lora(folder: Path) -> None:
            write_adapter(model, config, folder)
            write_common(folder)

        return ModelFiles(write_lora, lambda folder: read_adapter(model, folder))

    def write_full(folder: Path) -> None:
        save_model(model, plan, folder)
        write_common(folder)

    return ModelFiles(write_full, lambda folder: copy_weights(model, folder, plan.family.files))


def save_model(model: nn.Module, plan: ModelPlan, folder: Path) -> None:
    """Write the weights, config.json as it was read with the dtype of the weights in it, and the files beside it."""
    carried = carried_tensors(plan.folder, plan.family.files)
    save_weights(chain(model.state_dict().items(), carried), folder)
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
    import copy

    own = copy.copy(tokenizer)
    own.chat_template = template
    own.save_pretrained(folder)
