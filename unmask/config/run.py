"""The whole configuration of a run: one frozen dataclass of sections, read from YAML, checked before torch loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unmask.automodel import translate
from unmask.config.data import DataloaderConfig, DatasetConfig
from unmask.config.distributed import DistributedConfig
from unmask.config.model import ModelConfig, PeftConfig
from unmask.config.objective import DllmConfig, mode_problem
from unmask.config.reader import read_section, to_mapping
from unmask.config.results import METRICS, CheckpointConfig, ValidationConfig, WandbConfig
from unmask.config.training import ClipConfig, LRSchedulerConfig, OptimizerConfig, StepSchedulerConfig
from unmask.errors import ConfigError
from unmask.parsing import ParseProblem, parse_yaml
from unmask.places import user_path


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run."""

    model: ModelConfig
    dataset: DatasetConfig
    step_scheduler: StepSchedulerConfig
    dllm: DllmConfig = field(default_factory=DllmConfig)
    validation_dataset: DatasetConfig | None = None
    validation: ValidationConfig | None = None
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    clip_grad_norm: ClipConfig = field(default_factory=ClipConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    peft: PeftConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig | None = None
    seed: int = 42


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and which keys of it have no effect.

    Attributes:
        config: the checked configuration.
        not_needed: NeMo AutoModel keys that were read and have nothing to set here.
    """

    config: RunConfig
    not_needed: tuple[str, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file and apply `--section.key value` overrides.

    Args:
        path: the file; NeMo AutoModel's dLLM YAML is understood as well.
        overrides: command-line words, `--section.key value` or `--section.key=value`; values are YAML.

    Raises:
        ConfigError: no such file, not YAML, or anything in it that cannot be honoured.
    """
    values = _read_yaml(path)
    for key, value in parse_overrides(overrides):
        _set(values, key, value)
    return config_from_mapping(values)


def config_from_mapping(values: Mapping[str, Any]) -> LoadedConfig:
    """Check the plain mapping of a configuration; raises ConfigError."""
    _check_mode(values.get("dllm"))
    translated = translate(values)
    config = read_section(RunConfig, translated.values, "")
    steps = config.step_scheduler
    if steps.global_batch_size % steps.local_batch_size:
        raise ConfigError(
            f"step_scheduler.global_batch_size: {steps.global_batch_size} is not a multiple of local_batch_size "
            f"{steps.local_batch_size}; accumulation needs whole micro-batches"
        )
    if steps.val_every_steps is not None and config.validation_dataset is None:
        raise ConfigError(
            f"step_scheduler.val_every_steps: {steps.val_every_steps} needs a validation_dataset section; add one, or "
            "set val_every_steps: null"
        )
    _check_validation(config)
    _check_best(config)
    _check_rates(config)
    _check_rounding(config)
    return LoadedConfig(config, translated.not_needed)


def _check_mode(section: Any) -> None:
    """Refuse an objective that is not here, before the keys that only it has."""
    mode = section.get("mode") if isinstance(section, dict) else None
    problem = mode_problem(mode) if isinstance(mode, str) else None
    if problem is not None:
        raise ConfigError(f"dllm.mode: {problem}")


def _check_validation(config: RunConfig) -> None:
    """Refuse what validation cannot have of its own: it reads its rows in order, encoded as the training data's are."""
    training, validation = config.dataset, config.validation_dataset
    if validation is None:
        if config.validation is not None:
            raise ConfigError(
                "validation: answers rows of validation_dataset, and there is none; add that section, or set "
                "validation: null"
            )
        return
    if validation.shuffle_seed is not None:
        raise ConfigError("validation_dataset.shuffle_seed: validation rows are not shuffled; remove it")
    tokenizer = training.tokenizer or config.model.pretrained_model_name_or_path
    rendering = (
        ("tokenizer", tokenizer),
        ("chat_template", training.chat_template),
        ("chat_template_kwargs", training.chat_template_kwargs),
    )
    for name, used in rendering:
        value = getattr(validation, name)
        if value is not None and value != used:
            raise ConfigError(
                f"validation_dataset.{name}: {value!r} is not dataset's {used!r}, and validation uses the training "
                "data's tokenizer and template; remove it or set it equal"
            )


def _check_best(config: RunConfig) -> None:
    """Refuse a metric that nothing in the run measures."""
    metric = config.checkpoint.best_metric
    if metric is not None and getattr(config, METRICS[metric]) is None:
        raise ConfigError(
            f"checkpoint.best_metric: nothing in this run measures {metric}; add a {METRICS[metric]} section, or "
            "set best_metric: null"
        )


def _check_rates(config: RunConfig) -> None:
    """Refuse rates in the wrong order. A warm-up longer than the run is allowed: it tries a recipe's first steps."""
    rates, peak = config.lr_scheduler, config.optimizer.lr
    warmup = rates.lr_warmup_steps
    if warmup is not None and rates.lr_decay_steps is not None and rates.lr_decay_steps <= warmup:
        raise ConfigError(
            f"lr_scheduler.lr_decay_steps: {rates.lr_decay_steps} is not after lr_warmup_steps {warmup}; it counts "
            "from the run's start, so raise it, or set null for the end of the run"
        )
    for name in ("init_lr", "min_lr"):
        if getattr(rates, name) > peak:
            raise ConfigError(
                f"lr_scheduler.{name}: {getattr(rates, name)} is above optimizer.lr {peak}, the peak; lower it"
            )


def _check_rounding(config: RunConfig) -> None:
    """Refuse stochastic rounding where nothing that is trained can be bf16; adapters are fp32."""
    if not config.optimizer.stochastic_rounding:
        return
    if config.model.torch_dtype != "bfloat16":
        raise ConfigError(
            f"optimizer.stochastic_rounding: rounds bfloat16 weights, and model.torch_dtype is "
            f"{config.model.torch_dtype}; set that to bfloat16, or this to false"
        )
    if config.peft is not None and not config.peft.modules_to_save:
        raise ConfigError(
            "optimizer.stochastic_rounding: rounds bfloat16 weights, and adapters are trained in float32; set it to "
            "false"
        )


def dump_config(config: RunConfig) -> str:
    """Return the YAML of a resolved configuration; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Split command-line words into (dotted key, value) pairs.

    Raises:
        ConfigError: a word that is no `--section.key`, a key without a value, or a value that is not YAML.
    """
    pairs = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"{word!r}: expected an override of the form --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not queue or (queue[0].startswith("--") and len(queue[0]) > 2):
                raise ConfigError(f"--{key}: a value must follow, as in --{key} VALUE")
            text = queue.pop(0)
        try:
            pairs.append((key, parse_yaml(text)))
        except ParseProblem as problem:
            raise ConfigError(f"--{key}: {text!r} is not a YAML value ({problem}); quote it") from None
    return pairs


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    place: Any = values
    for depth, section in enumerate(sections, start=1):
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ConfigError(f"--{key}: {'.'.join(sections[:depth])} is not a section")
    place[name] = value


def _read_yaml(name: str | Path) -> dict[str, Any]:
    path = user_path(name, "-c")
    try:
        values = parse_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"-c {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"-c {path}: not UTF-8 text; save it as UTF-8") from None
    except ParseProblem as problem:
        raise ConfigError(f"-c {path}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"-c {path}: expected sections such as model, dataset and step_scheduler")
    return values
