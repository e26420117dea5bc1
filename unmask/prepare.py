"""What a run is made of, checked against the world before anything is built.

`prepare` does all checks that need no torch, so that a mistake is reported within a second or two; `build_parts` makes
what a dry run shows and a run uses, all but the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config import LoadedConfig, RunConfig
from unmask.data.sources import Rows, open_rows
from unmask.distributed.mesh import Degrees, resolve_degrees
from unmask.distributed.ranks import ALONE, Ranks, world_size
from unmask.errors import ConfigError
from unmask.evaluation.answering import check_answering
from unmask.models.folders import read_generation
from unmask.models.registry import ModelPlan, plan_model
from unmask.models.tokenizer import find_tokenizer
from unmask.objectives.registry import check_against_model, most_padding
from unmask.report.trackers import check_tracker
from unmask.training.lora import check_quantization

if TYPE_CHECKING:
    from unmask.data.chat import ChatTemplate
    from unmask.data.encode import RowEncoder
    from unmask.data.loader import TrainLoader
    from unmask.objectives.registry import Objective


@dataclass(frozen=True)
class Prepared:
    """A run whose configuration, model files, tokenizer and data were found and checked.

    Attributes:
        config: the configuration.
        not_needed: keys that were read and have nothing to set here.
        plan: the model, weights not loaded.
        tokenizer_folder: where the tokenizer is.
        rows, validation_rows: the opened data.
        degrees: how the processes of the run are arranged.
    """

    config: RunConfig
    not_needed: tuple[str, ...]
    plan: ModelPlan
    tokenizer_folder: Path
    rows: Rows
    validation_rows: Rows | None
    degrees: Degrees = Degrees()


def prepare(loaded: LoadedConfig, weights: bool = True, processes: int | None = None) -> Prepared:
    """Check everything that can be checked without torch. Raises an UnmaskError that names the field or file.

    Args:
        loaded: the configuration.
        weights: False leaves the weights of a hub id where they are; enough for a dry run.
        processes: how many the run is for; None = as many as the launcher started.
    """
    config = loaded.config
    processes = processes or world_size()
    check_tracker(config.wandb)
    plan = plan_model(config.model, weights)
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
    degrees = resolve_degrees(config.distributed, processes, getattr(plan.config, "num_experts", None))
    _check_batch(config, processes)
    check_answering(config.validation, plan.config, stored_generation(plan))
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
    return Prepared(config, loaded.not_needed, plan, tokenizer_folder, rows, validation_rows, degrees)


def _check_batch(config: RunConfig, processes: int) -> None:
    steps = config.step_scheduler
    if steps.global_batch_size % (steps.local_batch_size * processes):
        raise ConfigError(
            f"step_scheduler.global_batch_size: {steps.global_batch_size} is no multiple of local_batch_size "
            f"{steps.local_batch_size} × {processes} processes; every process needs as many whole micro-batches"
        )


@dataclass(frozen=True)
class Parts:
    """The pieces of a run that a dry run shows and a run uses.

    Attributes:
        tokenizer, template: how text becomes tokens.
        encode: row index → tokens, or the reason to leave the row out.
        loader: the training data.
        objective: corruption and loss.
        pad_token_id: padding; the model's EOS where it is supervised.
    """

    tokenizer: Any
    template: ChatTemplate
    encode: RowEncoder
    loader: TrainLoader
    objective: Objective
    pad_token_id: int


def build_parts(prepared: Prepared, ranks: Ranks = ALONE) -> Parts:
    """Build tokenizer, template, this rank's loader and objective; the network is not touched."""
    from unmask.data.chat import load_template
    from unmask.data.encode import RowEncoder
    from unmask.data.loader import TrainLoader
    from unmask.models.tokenizer import load_tokenizer
    from unmask.objectives.registry import build_objective

    config, plan = prepared.config, prepared.plan
    tokenizer = load_tokenizer(str(prepared.tokenizer_folder), "dataset.tokenizer")
    if len(tokenizer) > plan.config.rows:
        raise ConfigError(
            f"dataset.tokenizer: {prepared.tokenizer_folder} has {len(tokenizer)} ids, the model's embedding only "
            f"{plan.config.rows}; use the model's own tokenizer"
        )
    mask = getattr(plan.config, "mask_token_id", None)  # families without masked noise have none
    if mask is not None:
        _check_mask(tokenizer, mask, prepared.tokenizer_folder)
    template = load_template(
        tokenizer,
        config.dataset.chat_template,
        [] if mask is None else [mask],
        variables=config.dataset.chat_template_kwargs,
        supervise_reasoning=config.dataset.supervise_reasoning,
    )
    tokenizer.chat_template = template.source  # what evaluation during training prompts with, and what is saved
    encode = RowEncoder(prepared.rows, template, config.dataset)
    pad = plan.config.eos_token_id
    loader = TrainLoader(
        prepared.rows,
        encode,
        config=config.dataloader,
        global_batch_size=config.step_scheduler.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        rank=ranks.rank,
        world_size=ranks.size,
        seed=config.seed if config.dataset.shuffle_seed is None else config.dataset.shuffle_seed,
        pad_token_id=pad,
        supervise_padding=bool(config.dllm.supervise_padding),
        seq_length=config.dataset.seq_length,
    )
    return Parts(tokenizer, template, encode, loader, build_objective(config.dllm, plan.config), pad)


def _check_mask(tokenizer: Any, mask_token_id: int, folder: Path) -> None:
    """Refuse a mask that text can contain: the network could not tell it from what is hidden."""
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if mask_token_id < len(tokenizer) and mask_token_id not in special:
        raise ConfigError(
            f"dataset.tokenizer: {folder} uses the model's mask_token_id {mask_token_id} for ordinary text "
            f"({tokenizer.convert_ids_to_tokens(mask_token_id)!r}); use the model's own tokenizer, or add a mask token "
            "to this one and set the model's mask_token_id to its id"
        )


def _tokenizer_name(config: RunConfig, plan: ModelPlan) -> str:
    if config.dataset.tokenizer is not None:
        return config.dataset.tokenizer
    if plan.folder is None:
        raise ConfigError("dataset.tokenizer: a fresh model (model.config) has no tokenizer of its own; name a folder")
    return str(plan.folder)


def stored_generation(plan: ModelPlan) -> dict[str, Any]:
    """Return the checkpoint's generation_config.json; empty for a fresh model."""
    return {} if plan.folder is None else read_generation(plan.folder)
