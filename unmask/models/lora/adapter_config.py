"""Reads adapter_config.json of a PEFT LoRA adapter; every field of `peft.LoraConfig` is used, ignored or refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from unmask.errors import ModelError
from unmask.models.folders import ADAPTER_CONFIG, read_json


@dataclass(frozen=True)
class Field:
    """How a field of the file is treated.

    Attributes:
        types: allowed types of its value and of a list's entries; () = the field is not used.
        refused: why any value but null, false and empty is refused; "" = the field is not refused.
    """

    types: tuple[type, ...] = ()
    refused: str = ""


_NAMES = Field((str, list, NoneType))
_IGNORED = Field()
FIELDS: dict[str, Field] = {
    # What the adapter computes.
    "peft_type": Field((str,)),
    "r": Field((int,)),
    "lora_alpha": Field((int, float)),
    "use_rslora": Field((bool, NoneType)),
    "use_dora": Field((bool, NoneType)),
    "init_lora_weights": Field((bool, str, NoneType)),
    "rank_pattern": Field((dict, NoneType)),
    "alpha_pattern": Field((dict, NoneType)),
    # Which layers it adapts. The tensors' names say it, and must agree with these.
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": Field((int, list, NoneType)),
    "layers_pattern": _NAMES,
    "modules_to_save": Field((list, NoneType)),
    "target_parameters": Field((list, NoneType)),
    # Changes nothing here: records, options of training, what tensors show by themselves (bias), and what does not
    # concern nn.Linear (fan_in_fan_out).
    **dict.fromkeys(
        (
            "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
            "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
            "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        ),
        _IGNORED,
    ),
    # Asks for a computation that is not implemented.
    "alora_invocation_tokens": Field(refused="it applies behind these tokens alone"),
    "arrow_config": Field(refused="it routes each token to one of several adapters"),
    "kasa_config": Field(refused="it cuts the base's weights and scales the update"),
    "layer_replication": Field(refused="it repeats layers of the base"),
    "lora_bias": Field(refused="its updates have biases"),
    "megatron_config": Field(refused="its layers are Megatron's"),
    "monteclora_config": Field(refused="it draws its update at random"),
    "trainable_token_indices": Field(refused="it replaces rows of the embedding"),
    "use_bdlora": Field(refused="its matrices are block-diagonal"),
    "use_qalora": Field(refused="its update works on groups of a quantized base's inputs"),
    "velora_config": Field(refused="it stores more than the update"),
}  # fmt: skip

# Values of init_lora_weights that leave the base model as it is.
_INITS_KEEPING_BASE = ("gaussian", "orthogonal", "eva", "mica")
# Those that subtract the initial adapter from the base. These compute it from the base alone, so it can be repeated.
_REPEATABLE_INITS = ("pissa", "olora")
# These do not → what else it would take.
_UNREPEATABLE_INITS = {
    "pissa_niter": "the random numbers that it was drawn with",
    "corda": "its layers' inputs on the data that it was drawn with",
    "lora_ga": "the gradients that it was drawn with",
    "loftq": "the quantized base that it was drawn with",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter_config.json that are used, with the defaults of `peft.LoraConfig`."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None

    @property
    def changes_base(self) -> bool:
        """Whether the adapter belongs to a base from which its initial value was subtracted (PiSSA, OLoRA)."""
        return self.init_lora_weights in _REPEATABLE_INITS

    def adapts(self, name: str) -> bool:
        """Return whether PEFT would adapt the linear layer of that name; not for the head."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return True
        return bool(check_target_module_exists(self, name))


def rank_and_alpha(config: Any, name: str) -> tuple[int, float]:
    """Return the rank and alpha of a layer or stacked matrix, by the first pattern that matches its name."""
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    return (
        ranks.get(get_pattern_key(ranks, name), config.r),
        alphas.get(get_pattern_key(alphas, name), config.lora_alpha),
    )


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read a folder's adapter_config.json.

    Raises:
        ModelError: it is no LoRA adapter, a value has a wrong type, fields ask for what is not implemented (all of
            them are named), or its initialisation cannot be repeated.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    if (peft_type := values.get("peft_type")) != "LORA":
        raise ModelError(f"adapter: {folder} is of peft_type {peft_type!r}; only LORA adapters can be applied")
    refused = [f"{name}={_shown(value)} is not supported ({why})" for name, value, why in _refusals(values)]
    if refused:
        raise ModelError(
            f"{path}: {'; '.join(refused)}; where PEFT can merge it (merge_and_unload), save the merged model and give "
            "that as the checkpoint"
        )
    read = [name for name, known in FIELDS.items() if known.types and name != "peft_type"]
    given = {name: values[name] for name in read if name in values}
    for name, value in given.items():
        if not _has_type(name, value):
            raise ModelError(f"{path}: {name} cannot be {_shown(value)}; copy the adapter again")
    config = AdapterConfig(**{name: value for name, value in given.items() if value is not None})
    return dataclasses.replace(config, init_lora_weights=_initialisation(config.init_lora_weights, path))


def _refusals(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield (field, value, reason) for each field that asks for what is not implemented."""
    defaults = LoraConfig().to_dict()
    for name, value in values.items():
        known = FIELDS.get(name)
        if known is None and value not in (None, False, "", [], {}, defaults.get(name)):
            yield name, value, "a field that is not known here"
        elif known is not None and known.refused and value not in (None, False, "", []):
            yield name, value, known.refused


def _has_type(name: str, value: Any) -> bool:
    types = FIELDS[name].types
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return False
    if isinstance(value, list):
        entry = int if int in types else str
        return all(isinstance(each, entry) and not isinstance(each, bool) for each in value)
    if name == "r" or isinstance(value, dict):
        sizes = value.values() if isinstance(value, dict) else [value]
        number = int | float if name == "alpha_pattern" else int
        return all(isinstance(size, number) and not isinstance(size, bool) and size > 0 for size in sizes)
    return True


def _initialisation(value: bool | str, path: Path) -> bool | str:
    """Return the init_lora_weights with which PEFT makes the base that the stored tensors belong to."""
    name = value.lower() if isinstance(value, str) else value
    if isinstance(name, bool) or name in _INITS_KEEPING_BASE:
        return True
    if name in _REPEATABLE_INITS:
        return name
    need = next((need for lost, need in _UNREPEATABLE_INITS.items() if name.startswith(lost)), None)
    if need is None:
        raise ModelError(f"{path}: init_lora_weights={_shown(value)} is not known here; convert the adapter with PEFT")
    raise ModelError(
        f"{path}: init_lora_weights={_shown(value)} is not supported: the base that the adapter belongs to lacks what "
        f"it started with, and making it again would take {need}; convert it where it was trained (PEFT: "
        "save_pretrained with path_initial_model_for_weight_conversion), or merge it there"
    )


@contextmanager
def valid_patterns(folder: Path) -> Iterator[None]:
    """Turn a pattern that is no regular expression into a ModelError."""
    try:
        yield
    except re.error as error:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: {error.pattern!r} is no regular expression ({error}); copy the adapter again"
        ) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
