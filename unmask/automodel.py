"""NeMo AutoModel's dLLM YAML, translated: the only file that knows its keys.

What has an equivalent here is mapped. What cannot change a result here is dropped and listed once. What would change
results is refused by name. Keys that are already ours pass through untouched. What such a file leaves out keeps the
value that it has there, so that a file trains the same here as there.
Source of the keys: NVIDIA-NeMo/Automodel, examples/dllm_sft/*.yaml and its dLLM fine-tuning guide; of the defaults:
its recipes' `build_lr_scheduler`, and torch.optim.AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.places import user_path

# The classes that our own code stands for; another `_target_` in these places would train something else.
_TARGETS = {
    "model": ("NeMoAutoModelForCausalLM.from_pretrained",),
    "optimizer": ("torch.optim.AdamW", "torch.optim.adamw.AdamW"),
    "loss_fn": ("MaskedCrossEntropy",),
    "dataset": ("ChatDataset",),
    "validation_dataset": ("ChatDataset",),
    "dataloader": ("StatefulDataLoader",),
    "validation_dataloader": ("StatefulDataLoader",),
    "peft": ("PeftConfig",),
}

# Keys without influence on a result here, whatever their value.
_DROPPED = (
    "recipe",
    "ci",
    "dist_env",
    "loss_fn",
    "validation_dataloader",
    "model.trust_remote_code",
    "model.backend",
    "model.attn_implementation",
    "dataset.tokenizer.trust_remote_code",
    "validation_dataset.tokenizer.trust_remote_code",
    "dataloader.collate_fn",
    "dataloader.pin_memory",
    "dataloader.persistent_workers",
    "distributed.moe",
    "distributed.mp_policy._target_",
    "checkpoint.model_save_format",
    "step_scheduler.log_remote_every_steps",
    "wandb.save_dir",
)

# Keys without influence as long as they have one of these values; any other is refused with the reason.
_DROPPED_IF: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed.sequence_parallel": ((False, None), "there is no tensor parallelism to add it to"),
    "peft.match_all_linear": ((False, None), "name the layers in peft.target_modules"),
    "dllm.half_life_ratio": ((None,), "it belongs to another objective"),
    "dllm.ar_loss_alpha": ((None,), "it belongs to another objective"),
}

# A null here says what leaving the key out says.
_NULLABLE = (
    *("strategy", "dp_size", "dp_replicate_size", "tp_size", "cp_size", "pp_size", "ep_size"),
    *("mp_policy", "offload_policy", "autocast_dtype", "reshard_after_forward"),
)

# Templates of their repository, by file name, and ours of the same form.
_TEMPLATES = {"diffusion_gemma_chat_template.jinja": "diffusion_gemma", "llada_chat_template.jinja": "llada"}

# Patterns for the fused projections of LLaDA's remote code; the released weights and our network have split ones.
_FUSED = ("*.att_proj",)

_RENAMED = {"peft.dim": "peft.r", "peft.alpha": "peft.lora_alpha", "peft.dropout": "peft.lora_dropout"}


@dataclass(frozen=True)
class Translated:
    """A configuration in our own keys, and the dotted keys that were dropped."""

    values: dict[str, Any]
    not_needed: tuple[str, ...]


def translate(given: Mapping[str, Any]) -> Translated:
    """Return the configuration in our keys.

    Raises:
        ConfigError: a key or value that asks for something which would train differently here.
    """
    values = copy.deepcopy(dict(given))
    # The file is AutoModel's if it has `_target_` keys or a recipe.
    from_automodel = "recipe" in values or any(
        isinstance(section, dict) and "_target_" in section for section in values.values()
    )
    for section in list(values):
        _check_target(values, section)
    dropped = [key for key in _DROPPED if _pop(values, key, _MISSING) is not _MISSING]
    for key, (harmless, reason) in _DROPPED_IF.items():
        value = _pop(values, key, _MISSING)
        if value is _MISSING:
            continue
        if _nothing(value) not in harmless:
            raise ConfigError(f"{key}: {value!r} is not available here ({reason}); remove it")
        dropped.append(key)
    for old, new in _RENAMED.items():
        value = _pop(values, old, _MISSING)
        if value is not _MISSING:
            section, name = new.split(".")
            if name in values[section]:
                raise ConfigError(f"{old}: {new} is set too and means the same; remove one of them")
            values[section][name] = value
    _distributed(values, dropped)
    _canvas(values, dropped)
    for section in ("dataset", "validation_dataset"):
        _dataset(values.get(section), section, from_automodel, dropped)
    if from_automodel:
        _only_automodel(values, dropped)
    return Translated(values, tuple(dropped))


_MISSING = object()


def _pop(values: dict[str, Any], key: str, default: Any) -> Any:
    """Remove and return `values[a][b]…` for the dotted key a.b…; a subsection that it leaves empty is removed too.

    A section stays, however empty: `peft: {}` trains an adapter, no `peft` trains the model.
    """
    *sections, name = key.split(".")
    places = [values]
    for section in sections:
        inner = places[-1].get(section)
        if not isinstance(inner, dict):
            return default
        places.append(inner)
    if name not in places[-1]:
        return default
    value = places[-1].pop(name)
    if len(sections) == 2 and not places[-1]:
        del places[-2][sections[-1]]
    return value


def _nothing(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _check_target(values: dict[str, Any], section: str) -> None:
    content = values[section]
    if not isinstance(content, dict) or "_target_" not in content:
        return
    target = str(content.pop("_target_"))
    known = _TARGETS.get(section)
    if known is None:
        raise ConfigError(f"{section}._target_: {section} does not take a class here; remove it")
    if not target.endswith(known):
        raise ConfigError(f"{section}._target_: {target} has no equivalent here; {section} stands for {known[0]}")


def _distributed(values: dict[str, Any], dropped: list[str]) -> None:
    """Take words for what is not there, dtypes and policies as AutoModel writes them."""
    section = values.get("distributed")
    if not isinstance(section, dict):
        return
    for name in _NULLABLE:
        if name in section and _nothing(section[name]) is None:
            del section[name]
    if section.get("strategy") == "ddp":  # the same numbers, in more memory
        del section["strategy"]
        dropped.append("distributed.strategy")
    offload = section.get("offload_policy")
    if isinstance(offload, dict):
        target = str(offload.get("_target_"))
        if not target.endswith("CPUOffloadPolicy"):
            raise ConfigError(f"distributed.offload_policy: {target} has no equivalent here; set cpu or null")
        section["offload_policy"] = "cpu"
    policy = section.get("mp_policy")
    for holder in (section, policy):
        for name in ("autocast_dtype", "param_dtype", "reduce_dtype", "output_dtype"):
            if isinstance(holder, dict) and isinstance(holder.get(name), str):
                holder[name] = _nothing(holder[name].removeprefix("torch."))
    if isinstance(policy, dict):
        for name in [name for name, value in policy.items() if value is None]:
            del policy[name]
        if not policy:
            del section["mp_policy"]


def _canvas(values: dict[str, Any], dropped: list[str]) -> None:
    """Map what AutoModel's DiffusionGemma files say of the model, and of padding, to the objective."""
    for old, new in (("model.canvas_length", "block_size"), ("model.freeze_router", "freeze_router")):
        value = _pop(values, old, _MISSING)
        if value is not _MISSING:
            _set_objective(values, old, new, value)
    conditioned = _pop(values, "model.self_conditioning", _MISSING)
    if conditioned is False:
        _set_objective(values, "model.self_conditioning", "self_conditioning_p", 0.0)
    elif conditioned is True:
        dropped.append("model.self_conditioning")  # it is on unless dllm.self_conditioning_p is 0
    elif conditioned is not _MISSING:
        raise ConfigError(f"model.self_conditioning: expected true or false, got {conditioned!r}")
    section = values.get("dllm")
    blocks = isinstance(section, dict) and section.get("mode") == "block_diffusion"
    for key in ("dllm.pad_block_size", "dllm.pad_seq_len_divisible"):
        value = _nothing(_pop(values, key, _MISSING))
        if value is _MISSING:
            continue
        if value is not None and not blocks:
            raise ConfigError(f"{key}: {value!r} is not available here (rows are padded to the longest of the batch)")
        if value is not None and key == "dllm.pad_block_size":  # an answer is filled up to a whole canvas
            _set_objective(values, key, "block_size", value)
        dropped.append(key)


def _set_objective(values: dict[str, Any], key: str, name: str, value: Any) -> None:
    """Set dllm.<name>, unless it says something else already."""
    section = values.setdefault("dllm", {})
    if not isinstance(section, dict):
        return
    if section.get(name, value) not in (value, None):
        raise ConfigError(f"{key}: {value!r} contradicts dllm.{name}, which is {section[name]!r}; remove one of them")
    section[name] = value


def _only_automodel(values: dict[str, Any], dropped: list[str]) -> None:
    """Fill in what AutoModel's own defaults say, and drop what it takes without effect."""
    steps, optimizer, schedule = (values.get(name) for name in ("step_scheduler", "optimizer", "lr_scheduler"))
    if isinstance(steps, dict) and steps.get("val_every_steps") and values.get("validation_dataset") is None:
        del steps["val_every_steps"]
        dropped.append("step_scheduler.val_every_steps")
    if _pop(values, "validation_dataset.shuffle_seed", _MISSING) is not _MISSING:
        dropped.append("validation_dataset.shuffle_seed")
    if isinstance(optimizer, dict):
        for name, value in (("lr", 1e-3), ("weight_decay", 0.01)):
            optimizer.setdefault(name, value)
    peak = optimizer.get("lr") if isinstance(optimizer, dict) else None
    if isinstance(schedule, dict):
        schedule.setdefault("lr_decay_style", "cosine")
        schedule.setdefault("lr_warmup_steps", None)
        if isinstance(peak, (int, float)):
            schedule.setdefault("init_lr", 0.1 * peak)
            schedule.setdefault("min_lr", 0.01 * peak)
    patterns = values["peft"].get("target_modules") if isinstance(values.get("peft"), dict) else None
    if isinstance(patterns, list) and any(pattern not in _FUSED for pattern in patterns):
        for pattern in [pattern for pattern in patterns if pattern in _FUSED]:
            patterns.remove(pattern)
            dropped.append(f"peft.target_modules {pattern}")


def _dataset(section: Any, where: str, from_automodel: bool, dropped: list[str]) -> None:
    if not isinstance(section, dict):
        return
    tokenizer = section.get("tokenizer")
    if isinstance(tokenizer, dict):
        tokenizer.pop("_target_", None)
        name = tokenizer.pop("pretrained_model_name_or_path", None)
        if tokenizer:
            raise ConfigError(f"{where}.tokenizer.{next(iter(tokenizer))}: not available here; remove it")
        section["tokenizer"] = name
    template = Path(str(section.get("chat_template")))
    if from_automodel and template.name in _TEMPLATES and not user_path(template, "dataset.chat_template").exists():
        section["chat_template"] = _TEMPLATES[template.name]
    if from_automodel and section.get("mask_history") is None:
        section.setdefault("answers", "all")  # it supervises every answer, whatever the model's attention
    path = str(section.get("path_or_dataset_id", ""))
    if from_automodel and "split" in section and path.endswith((".jsonl", ".json", ".parquet", ".arrow")):
        if section["split"] in ("train", "validation", "test", None):  # names the only split that one file has
            del section["split"]
            dropped.append(f"{where}.split")
