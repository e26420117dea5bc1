"""What makes two runs the same: what all ranks must have alike, and what a checkpoint must share with its run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from unmask.config import dump_config
from unmask.config.reader import to_mapping
from unmask.models.folders import weights_fingerprint

if TYPE_CHECKING:
    from unmask.prepare import Prepared


def agreement(prepared: Prepared) -> dict[str, str]:
    """Return what all ranks must have alike, by the name that a message shows."""
    import platform

    import torch
    import transformers

    config, plan = prepared.config, prepared.plan
    validation = prepared.validation_rows
    hashed = {
        "configuration": dump_config(config),
        "model": json.dumps([plan.config_json, None if plan.folder is None else weights_fingerprint(plan.folder)]),
        "training data": prepared.rows.fingerprint,
        "validation data": "" if validation is None else validation.fingerprint,
    }
    return {
        **{name: hashlib.blake2b(str(text).encode(), digest_size=6).hexdigest() for name, text in hashed.items()},
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "version of Python": ".".join(platform.python_version_tuple()[:2]),
    }


def run_identity(prepared: Prepared) -> dict[str, Any]:
    """Return what a checkpoint must share with a run to be resumed by it."""
    config, folder = prepared.config, prepared.plan.folder
    return {
        "model": json.loads(json.dumps(dataclasses.asdict(prepared.plan.config))),
        "torch_dtype": config.model.torch_dtype,
        "peft": None if config.peft is None else to_mapping(config.peft),
        "base": None if config.peft is None or folder is None else weights_fingerprint(folder),
        "data": prepared.rows.fingerprint,
        "global_batch_size": config.step_scheduler.global_batch_size,
        "seed": [config.seed, config.dataset.shuffle_seed],
        "order": [config.dataloader.shuffle, config.dataloader.group_by_length],
    }
