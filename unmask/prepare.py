"""A run's configuration checked against the world: model files, tokenizer, data, processes.

Nothing here needs torch, so a mistake is reported within a second or two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from unmask.config import LoadedConfig, RunConfig
from unmask.config.data import resolve_answers
from unmask.config.model import PeftConfig
from unmask.config.results import ValidationConfig
from unmask.data.sources import Rows, open_rows
from unmask.distributed.processes import Degrees, check_restarts, resolve_degrees, world_size
from unmask.errors import ConfigError, SamplingError
from unmask.evaluation.grade import check_grader
from unmask.models.folders import read_generation
from unmask.models.registry import ModelPlan, plan_model
from unmask.models.tokenizer import find_tokenizer
from unmask.objectives.registry import check_against_model, most_padding
from unmask.places import user_path
from unmask.report.trackers import check_tracker
from unmask.sampling.settings import SamplerSettings, resolve_settings


@dataclass(frozen=True)
class Prepared:
    """A run whose configuration, model files, tokenizer and data were found and checked.

    Attributes:
        config: the configuration, with `answers` of its data sections chosen.
        not_needed: keys that were read and have nothing to set here.
        plan: the model, weights not loaded.
        tokenizer_folder: where the tokenizer is.
        validation_settings: what answers are sampled with during training; None where none are.
        degrees: how the processes of the run are arranged.
    """

    config: RunConfig
    not_needed: tuple[str, ...]
    plan: ModelPlan
    tokenizer_folder: Path
    rows: Rows
    validation_rows: Rows | None
    validation_settings: SamplerSettings | None = None
    degrees: Degrees = Degrees()


def prepare(loaded: LoadedConfig, weights: bool = True, processes: int | None = None) -> Prepared:
    """Check everything that can be checked without torch. Raises an UnmaskError that names the field or file.

    Args:
        weights: False leaves the weights of a hub id where they are; enough for a dry run.
        processes: how many the run is for; None = as many as the launcher started.
    """
    config = loaded.config
    processes = processes or world_size()
    root = user_path(config.checkpoint.checkpoint_dir, "checkpoint.checkpoint_dir")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"checkpoint.checkpoint_dir: {root} is a file; choose a folder")
    check_restarts(config.checkpoint.enabled)
    check_tracker(config.wandb)
    plan = plan_model(config.model, weights)
    config = _with_answers(config, plan.family.attention)
    if config.peft is not None and plan.folder is None:
        raise ConfigError(
            "peft: an adapter needs a base checkpoint, and model.config makes a fresh network; set "
            "model.pretrained_model_name_or_path, or remove peft"
        )
    if config.peft is not None and config.dllm.freeze_router is False:
        raise ConfigError(
            "dllm.freeze_router: false has no effect with peft, which freezes the whole model and trains an adapter; "
            "leave it out"
        )
    check_quantization(config.peft, processes)
    if config.optimizer.stochastic_rounding and find_spec("torchao") is None:
        raise ConfigError(
            "optimizer.stochastic_rounding: needs torchao; install it with `pip install 'unmask[lean]'`, or set false"
        )
    degrees = resolve_degrees(
        config.distributed, processes, plan.config.num_experts if plan.family.shard.experts else None
    )
    _check_batch(config, processes)
    validation_settings = _validation_settings(config.validation, plan)
    check_against_model(config.dllm, plan.family, plan.config)
    tokenizer_folder = find_tokenizer(_tokenizer_name(config, plan), "dataset.tokenizer")
    room = plan.config.max_sequence_length - most_padding(config.dllm, plan.config)
    for name, section in (("dataset", config.dataset), ("validation_dataset", config.validation_dataset)):
        if section is not None and section.seq_length > room:
            raise ConfigError(
                f"{name}.seq_length: {section.seq_length} is longer than the model's max_sequence_length "
                f"{plan.config.max_sequence_length} allows; set it to {room} or less"
            )
    rows = open_rows(config.dataset, "dataset")
    if len(rows) < config.step_scheduler.global_batch_size:
        raise ConfigError(
            f"step_scheduler.global_batch_size: {config.step_scheduler.global_batch_size} is more than the "
            f"{len(rows)} rows of the dataset; lower it or give more rows"
        )
    validation_rows = None
    if config.validation_dataset is not None:
        validation_rows = open_rows(config.validation_dataset, "validation_dataset")
    return Prepared(
        config, loaded.not_needed, plan, tokenizer_folder, rows, validation_rows, validation_settings, degrees
    )


def _with_answers(config: RunConfig, attention: str) -> RunConfig:
    """Return the configuration with what its sections leave to the model chosen."""
    validation = config.validation_dataset
    return replace(
        config,
        dataset=resolve_answers(config.dataset, attention),
        validation_dataset=None if validation is None else resolve_answers(validation, attention),
    )


def _validation_settings(section: ValidationConfig | None, plan: ModelPlan) -> SamplerSettings | None:
    """Return what answers are sampled with during training; refuse what the family or this machine cannot do."""
    if section is None:
        return None
    check_grader(section.grader)
    generation = {} if plan.folder is None else read_generation(plan.folder)
    try:
        return resolve_settings(section.settings(), plan.family, plan.config, generation)
    except SamplingError as error:
        raise ConfigError(f"validation.sampler: {error}") from None


def check_quantization(section: PeftConfig | None, processes: int) -> None:
    """Refuse `load_in_4bit` without bitsandbytes, or on several processes: packed weights are not sharded."""
    if section is None or not section.load_in_4bit:
        return
    if find_spec("bitsandbytes") is None:
        raise ConfigError("peft.load_in_4bit: needs bitsandbytes; install it with `pip install 'unmask[quant]'`")
    if processes > 1:
        raise ConfigError(
            f"peft.load_in_4bit: works on one device, and {processes} processes were started; start one, or set it "
            "false"
        )


def _check_batch(config: RunConfig, processes: int) -> None:
    steps = config.step_scheduler
    if steps.global_batch_size % (steps.local_batch_size * processes):
        raise ConfigError(
            f"step_scheduler.global_batch_size: {steps.global_batch_size} is no multiple of local_batch_size "
            f"{steps.local_batch_size} × {processes} processes; every process needs as many whole micro-batches"
        )


def _tokenizer_name(config: RunConfig, plan: ModelPlan) -> str:
    if config.dataset.tokenizer is not None:
        return config.dataset.tokenizer
    if plan.folder is None:
        raise ConfigError("dataset.tokenizer: a fresh model (model.config) has no tokenizer of its own; name a folder")
    return str(plan.folder)
