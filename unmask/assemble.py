"""The only file that knows every part: it checks a configuration against the world and puts a run together.

`prepare` does all checks that need no torch, so that a mistake is reported within a second or two; `assemble` builds.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.announce import announce, left_out, name_rows
from unmask.config import LoadedConfig, RunConfig, dump_config
from unmask.data.sources import Rows, open_rows
from unmask.distributed.mesh import Degrees, resolve_degrees
from unmask.distributed.ranks import ALONE, Ranks, world_size
from unmask.errors import ConfigError
from unmask.evaluation.answering import SAMPLES, answer_validator, check_answering, check_lengths, questions_of
from unmask.identity import agreement, run_identity
from unmask.models.folders import read_generation
from unmask.models.registry import ModelPlan, plan_model
from unmask.models.tokenizer import find_tokenizer
from unmask.objectives.registry import check_against_model, most_padding
from unmask.report.metrics import FILE, MetricsLog, SilentLog, read_metrics
from unmask.report.trackers import check_tracker
from unmask.sections import to_mapping
from unmask.training.lora import check_quantization
from unmask.training.run_directory import hold_run_dir

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from unmask.data.chat import ChatTemplate
    from unmask.data.encode import RowEncoder
    from unmask.data.loader import TrainLoader, ValidationSet
    from unmask.distributed.runtime import Runtime
    from unmask.objectives.registry import Objective
    from unmask.training.evaluate import Validator
    from unmask.training.loop import TrainingOutcome, TrainingRun
    from unmask.training.network import NetworkSettings
    from unmask.training.resume import ResumePoint


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
    check_answering(config.validation, plan.config, _generation(plan))
    check_against_model(config.dllm, plan.family.provides, plan.family.model_type, plan.config)
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


Measure = Callable[["nn.Module"], Mapping[str, Any]]


def assemble(
    prepared: Prepared,
    runtime: Runtime,
    console: Console,
    extra_validators: Callable[[Parts], Sequence[Measure]] = lambda _: (),
    is_good_enough: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> tuple[TrainingRun, ResumePoint]:
    """Load or draw the model, build all parts of the run and put it back to its newest checkpoint.

    The run directory exists and is held by the caller (`run_directory.hold_run_dir`).

    Args:
        prepared: from `prepare`.
        runtime: device and ranks; all ranks assemble together, and rank 0 alone writes and talks.
        console: where progress goes.
        extra_validators: further measurements at each validation.
        is_good_enough: may end the run, told what was measured at a step.
    """
    from unmask.report.progress import TrainingProgress
    from unmask.rng import NoiseStream
    from unmask.training.loop import TrainingRun
    from unmask.training.network import build_network
    from unmask.training.resume import ResumeParts, resume

    config, root = prepared.config, Path(prepared.config.checkpoint.checkpoint_dir).expanduser()
    parts = build_parts(prepared, runtime.ranks)
    total_steps = config.step_scheduler.total_steps(parts.loader.steps_per_epoch)
    validation = _validation_set(prepared, parts)
    measures = [] if validation is None else [_measure_loss(prepared, validation, runtime)]
    validators = _validators(prepared, parts, runtime, root, [*measures, *extra_validators(parts)])
    network = build_network(_network_settings(prepared, parts, root), runtime)
    identity = run_identity(prepared)
    start = resume(
        root,
        config.checkpoint,
        identity,
        ResumeParts(parts.loader, network.restore, (root / FILE, root / SAMPLES), runtime.ranks),
    )
    run = TrainingRun(
        root=root,
        model=network.model,
        objective=parts.objective,
        loader=parts.loader,
        optimizer=network.optimizer,
        noise=NoiseStream(config.seed),
        runtime=runtime,
        steps=config.step_scheduler,
        total_steps=total_steps,
        schedule=config.lr_scheduler,
        peak_lr=config.optimizer.lr,
        max_norm=config.clip_grad_norm.max_norm,
        checkpoint=config.checkpoint,
        identity=identity,
        saver=network.saver(start.folder),
        validators=validators,
        metrics=_open_log(config, root) if runtime.ranks.first else SilentLog(),
        progress=TrainingProgress(total_steps, start.step, console),
        name_rows=partial(name_rows, prepared.rows),
        is_good_enough=is_good_enough,
        defer_grad_sync=config.distributed.defer_grad_sync,
    )
    announce(run, prepared, validation, start)
    return run, start


def _network_settings(prepared: Prepared, parts: Parts, root: Path) -> NetworkSettings:
    from unmask.training.network import NetworkSettings

    config = prepared.config
    return NetworkSettings(
        plan=prepared.plan,
        dtype=config.model.torch_dtype,
        peft=config.peft,
        freeze_router=bool(config.dllm.freeze_router),
        distributed=config.distributed,
        optimizer=config.optimizer,
        checkpoint=config.checkpoint,
        seed=config.seed,
        root=root,
        tokenizer=parts.tokenizer,
        template=parts.template.source,
        run_config=dump_config(config),
    )


def _open_log(config: RunConfig, root: Path) -> MetricsLog:
    """Write config.yaml and open metrics.jsonl and the tracker."""
    from unmask.report.trackers import open_tracker

    (root / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    tracker = open_tracker(config.wandb, root, to_mapping(config))
    return MetricsLog(root / FILE, [tracker.log] if tracker else [], [tracker.close] if tracker else [])


def run_training(
    prepared: Prepared,
    console: Console,
    extra_validators: Callable[[Parts], Sequence[Measure]] = lambda _: (),
    is_good_enough: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    own_process: bool = False,
) -> TrainingOutcome:
    """Assemble, train, and draw the curve; `unmask train` and the quickstart both come here.

    With several processes each of them calls this; rank 0 alone talks and writes logs. `own_process` says that this
    process does nothing else, so that on a CPU it may keep the memory that it frees.
    """
    section = prepared.config.checkpoint
    root = Path(section.checkpoint_dir).expanduser()
    with contextlib.ExitStack() as stack:
        if prepared.degrees.world == 1:
            stack.enter_context(hold_run_dir(root, section))
        from unmask.distributed.host_memory import keep_freed_memory
        from unmask.distributed.runtime import build_runtime
        from unmask.training.loop import train

        runtime = build_runtime(prepared.config.distributed, prepared.degrees)
        if own_process and runtime.device.type == "cpu":
            keep_freed_memory()
        if prepared.degrees.world > 1:
            runtime.ranks.agree(agreement(prepared))
            if runtime.ranks.first:
                stack.enter_context(hold_run_dir(root, section))
            else:
                console = _silent_console()
            runtime.ranks.barrier()  # nobody looks into the run directory before rank 0 holds it
        run, start = assemble(prepared, runtime, console, extra_validators, is_good_enough)
        try:
            outcome = train(run, start)
            if runtime.ranks.first and outcome.reason != "already finished":
                _draw_curve(root)
        finally:
            run.metrics.close()
    for line in left_out(run.loader.dropped, run.loader.examples):
        console.print(line, markup=False)
    return outcome


def _silent_console() -> Console:
    from rich.console import Console

    return Console(quiet=True)


def _draw_curve(root: Path) -> None:
    from unmask.report.plots import plot_runs

    if any(event["event"] == "train" for event in read_metrics(root / FILE)):
        plot_runs([root], root / "loss.png")


def _tokenizer_name(config: RunConfig, plan: ModelPlan) -> str:
    if config.dataset.tokenizer is not None:
        return config.dataset.tokenizer
    if plan.folder is None:
        raise ConfigError("dataset.tokenizer: a fresh model (model.config) has no tokenizer of its own; name a folder")
    return str(plan.folder)


def _validation_set(prepared: Prepared, parts: Parts) -> ValidationSet | None:
    if prepared.validation_rows is None:
        return None
    from unmask.data.encode import RowEncoder
    from unmask.data.loader import validation_set

    config = prepared.config
    assert config.validation_dataset is not None
    return validation_set(
        prepared.validation_rows,
        RowEncoder(prepared.validation_rows, parts.template, config.validation_dataset, "validation_dataset"),
        local_batch_size=config.step_scheduler.local_batch_size,
        pad_token_id=parts.pad_token_id,
        supervise_padding=bool(config.dllm.supervise_padding),
        seq_length=config.validation_dataset.seq_length,
    )


def _validators(
    prepared: Prepared, parts: Parts, runtime: Runtime, root: Path, measures: Sequence[Measure]
) -> list[Validator]:
    """Return what is measured during the run: losses at each validation, answers as often as `validation` says."""
    from unmask.training.evaluate import Validator

    config, section, found = prepared.config, prepared.config.validation, []
    if measures:
        every = config.step_scheduler.val_every_steps
        found.append(Validator("validation", every, lambda model, _: _merged(measure(model) for measure in measures)))
    if section is not None and prepared.validation_rows is not None:
        questions = questions_of(prepared.validation_rows, section.max_samples)
        check_lengths(questions, section, parts.tokenizer, prepared.plan.config, _generation(prepared.plan))
        family = prepared.plan.family.model_type
        measure = answer_validator(questions, section, parts.tokenizer, family, runtime, config.seed, root)
        found.append(Validator("exact_match", section.generate_every_steps, measure))
    return found


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _generation(plan: ModelPlan) -> dict[str, Any]:
    return {} if plan.folder is None else read_generation(plan.folder)


def _measure_loss(prepared: Prepared, validation: ValidationSet, runtime: Runtime) -> Measure:
    from unmask.evaluation.validation import fixed_noise, validation_losses
    from unmask.objectives.registry import build_objective

    section = dataclasses.replace(prepared.config.dllm, time_sampling="stratified")
    objective = build_objective(section, prepared.plan.config)
    noisy = fixed_noise(objective, validation.batches, prepared.config.seed, runtime.ranks)
    return lambda model: validation_losses(model, objective, noisy, runtime)
