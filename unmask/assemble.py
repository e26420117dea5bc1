"""The only file that knows every part: it puts a checked run together and trains it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from unmask.announce import agreement, announce, left_out, name_rows, noted, run_identity
from unmask.config import RunConfig, dump_config
from unmask.config.reader import to_mapping
from unmask.data.batches import ValidationSet, validation_set
from unmask.data.check import Checked, check_rows
from unmask.data.encode import RowEncoder
from unmask.distributed.failures import keep_tracebacks_in
from unmask.distributed.processes import cores
from unmask.distributed.ranks import from_first
from unmask.distributed.runtime import Runtime, build_runtime, keep_freed_memory, matmul_dtype
from unmask.distributed.shard import whole_view
from unmask.evaluation.tasks import questions_of
from unmask.evaluation.validation import SAMPLES, answer_validator, fixed_noise, validation_losses
from unmask.objectives.registry import build_objective
from unmask.parts import Parts, build_parts, seen_later_turns
from unmask.places import part_of, user_path
from unmask.prepare import Prepared
from unmask.report.metrics import FILE, MetricsLog, SilentLog, read_metrics
from unmask.report.plots import plot_runs
from unmask.report.progress import TrainingProgress, checking_rows
from unmask.report.trackers import open_tracker
from unmask.rng import NoiseStream
from unmask.training.checkpoint import newest_data
from unmask.training.flops import count_flops, peak_flops
from unmask.training.loop import train
from unmask.training.network import NetworkSettings, build_network, other_files, restore
from unmask.training.profiling import StepProfiler
from unmask.training.run import (
    ResumeParts,
    ResumePoint,
    TrainingOutcome,
    TrainingRun,
    Validator,
    check_shared,
    resume,
)
from unmask.training.run_directory import hold_run_dir
from unmask.training.saver import Saver

Measure = Callable[[nn.Module], Mapping[str, Any]]


def assemble(
    prepared: Prepared,
    runtime: Runtime,
    console: Console,
    extra_validators: Callable[[Parts], Sequence[Measure]] = lambda _: (),
    is_good_enough: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    processes: int = 0,
    profile: int = 0,
) -> tuple[TrainingRun, ResumePoint]:
    """Load or draw the model, build all parts of the run and put it back to its newest checkpoint.

    The run directory exists and is held by the caller (`run_directory.hold_run_dir`). All ranks assemble together, and
    rank 0 alone writes and talks.

    Args:
        extra_validators: further measurements at each validation.
        is_good_enough: called with what was measured at a step; True ends the run.
        processes: worker processes that may check rows before the first step.
        profile: steps to profile.
    """
    config, root = prepared.config, user_path(prepared.config.checkpoint.checkpoint_dir, "checkpoint.checkpoint_dir")
    parts = build_parts(prepared, runtime.ranks)
    checked = from_first(runtime.ranks, lambda: _check_rows(prepared, parts, root, console, processes))
    total_steps = config.step_scheduler.total_steps(parts.loader.steps_per_epoch)
    validation = _validation_set(prepared, parts)
    measures = [] if validation is None else [_measure_loss(prepared, validation, runtime)]
    validators = _validators(prepared, parts, runtime, root, [*measures, *extra_validators(parts)])
    network = build_network(_network_settings(prepared), runtime)
    identity = run_identity(prepared)
    start = resume(
        root,
        config.checkpoint,
        identity,
        ResumeParts(parts.loader, partial(restore, network), (root / FILE, root / SAMPLES), runtime.ranks),
    )
    files = {}
    if runtime.ranks.first:
        files = other_files(network, parts.tokenizer, parts.template.source, dump_config(config), parts.stop_ids)
    progress = TrainingProgress(total_steps, start.step, console)
    whole = partial(whole_view, meshes=runtime.meshes)
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
        saver=Saver(root, config.checkpoint, network, runtime, files, start.folder),
        validators=validators,
        metrics=_open_log(config, root) if runtime.ranks.first else SilentLog(),
        checked=checked,
        progress=progress,
        count_flops=count_flops(network.model, prepared.plan.family, prepared.plan.config, whole),
        peak=peak_flops(runtime.device, getattr(torch, matmul_dtype(config, runtime.device))),
        profiler=StepProfiler(profile if runtime.ranks.first else 0, root / "profile", progress.say),
        name_rows=partial(name_rows, prepared.rows),
        is_good_enough=is_good_enough,
        defer_grad_sync=config.distributed.defer_grad_sync,
    )
    announce(run, prepared, validation, start, seen_later_turns(prepared, parts.template))
    return run, start


def _check_rows(prepared: Prepared, parts: Parts, root: Path, console: Console, processes: int) -> Checked | None:
    """Check the rows; None when the run goes on with the data that it began with."""
    if newest_data(root) == prepared.rows.fingerprint:
        return None
    with checking_rows(console) as tick:
        return check_rows(prepared.rows, parts.encode, processes, tick)


def _network_settings(prepared: Prepared) -> NetworkSettings:
    config = prepared.config
    return NetworkSettings(
        plan=prepared.plan,
        dtype=config.model.torch_dtype,
        peft=config.peft,
        freeze_router=bool(config.dllm.freeze_router),
        distributed=config.distributed,
        optimizer=config.optimizer,
        seed=config.seed,
    )


def _open_log(config: RunConfig, root: Path) -> MetricsLog:
    """Write config.yaml and open metrics.jsonl and the tracker."""
    with part_of(root / "config.yaml") as part:
        part.write_text(dump_config(config), encoding="utf-8")
    tracker = open_tracker(config.wandb, root, to_mapping(config))
    return MetricsLog(root / FILE, [tracker.log] if tracker else [], [tracker.close] if tracker else [])


def run_training(
    prepared: Prepared,
    console: Console,
    extra_validators: Callable[[Parts], Sequence[Measure]] = lambda _: (),
    is_good_enough: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    own_process: bool = False,
    profile: int = 0,
) -> TrainingOutcome:
    """Assemble, train, and draw the curve; `unmask train` and the quickstart both come here.

    With several processes each of them calls this; rank 0 alone talks and writes logs. `own_process` says that this
    process does nothing else, so that on a CPU it may keep the memory that it frees. `profile` is how many steps rank 0
    profiles.
    """
    section = prepared.config.checkpoint
    root = user_path(section.checkpoint_dir, "checkpoint.checkpoint_dir")
    with contextlib.ExitStack() as stack:
        if prepared.degrees.world == 1:
            stack.enter_context(hold_run_dir(root, section))
        runtime = build_runtime(prepared.config.distributed, prepared.degrees)
        if own_process and runtime.device.type == "cpu":
            keep_freed_memory()
        if prepared.degrees.world > 1:
            runtime.ranks.agree(agreement(prepared))
            if runtime.ranks.first:
                stack.enter_context(hold_run_dir(root, section))
            else:
                console = Console(quiet=True)
            runtime.ranks.barrier()  # nobody looks into the run directory before rank 0 holds it
            if section.enabled:
                check_shared(root, runtime.ranks)
            keep_tracebacks_in(root)
        processes = cores() if own_process else 0
        run, start = assemble(prepared, runtime, console, extra_validators, is_good_enough, processes, profile)
        try:
            outcome = train(run, start)
            if runtime.ranks.first and outcome.reason != "already finished":
                _draw_curve(root)
        finally:
            run.metrics.close()
    loader = run.loader
    said = {} if run.checked is None else run.checked.noted
    news = {note: count for note, count in loader.noted.items() if note not in said}
    for line in (*left_out(loader.dropped, loader.examples), *noted(news, loader.examples)):
        console.print(line, markup=False)
    return outcome


def _draw_curve(root: Path) -> None:
    if any(event["event"] == "train" for event in read_metrics(root / FILE)):
        plot_runs([root], root / "loss.png")


def _validation_set(prepared: Prepared, parts: Parts) -> ValidationSet | None:
    if prepared.validation_rows is None:
        return None
    config = prepared.config
    assert config.validation_dataset is not None
    return validation_set(
        prepared.validation_rows,
        RowEncoder(prepared.validation_rows, parts.template, config.validation_dataset, where="validation_dataset"),
        local_batch_size=config.step_scheduler.local_batch_size,
        pad_token_id=parts.pad_token_id,
        supervise_padding=bool(config.dllm.supervise_padding),
        seq_length=config.validation_dataset.seq_length,
    )


def _validators(
    prepared: Prepared, parts: Parts, runtime: Runtime, root: Path, measures: Sequence[Measure]
) -> list[Validator]:
    """Return what is measured during the run: losses at each validation, answers as often as `validation` says."""
    config, validators = prepared.config, []
    section, settings = config.validation, prepared.validation_settings
    if measures:
        every = config.step_scheduler.val_every_steps

        def measure_losses(model: nn.Module, _: int) -> dict[str, Any]:
            return {name: value for measure in measures for name, value in measure(model).items()}

        validators.append(Validator("validation", every, measure_losses))
    if section is not None and settings is not None and prepared.validation_rows is not None:
        skip = config.validation_dataset is not None and config.validation_dataset.on_malformed == "skip"
        questions = questions_of(prepared.validation_rows, section.max_samples, skip)
        measure = answer_validator(
            questions, section, settings, parts.tokenizer, prepared.plan.config, runtime, config.seed, root
        )
        validators.append(Validator("exact_match", section.generate_every_steps, measure))
    return validators


def _measure_loss(prepared: Prepared, validation: ValidationSet, runtime: Runtime) -> Measure:
    section = prepared.config.dllm
    if section.time_sampling is not None:  # None where the objective draws no levels
        section = dataclasses.replace(section, time_sampling="stratified")
    objective = build_objective(section, prepared.plan.config)
    noisy = fixed_noise(objective, validation.batches, prepared.config.seed, runtime.ranks)
    return lambda model: validation_losses(model, objective, noisy, runtime)
