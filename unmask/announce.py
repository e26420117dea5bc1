"""What a run says and records before its first step, and what makes two runs the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

import unmask
from unmask.config import RunConfig, dump_config
from unmask.config.reader import differences, to_mapping
from unmask.data.batches import ValidationSet
from unmask.data.sources import Rows
from unmask.distributed.processes import data_workers
from unmask.distributed.runtime import idle_tensor_cores, matmul_dtype
from unmask.machine import cores
from unmask.models.folders import weights_fingerprint
from unmask.models.lora.quantized import packed_elements
from unmask.parsing import parse_yaml
from unmask.prepare import Prepared
from unmask.training.run import ResumePoint, TrainingRun


def announce(
    run: TrainingRun,
    prepared: Prepared,
    validation: ValidationSet | None,
    start: ResumePoint,
    notes: Sequence[str],
) -> None:
    """Say and record what this run, made from `prepared`, is about to do from `start` on; `notes` are of its data."""
    from unmask.distributed.shard import whole_view  # its DTensor takes seconds to import

    sizes = [(whole_view(p, run.runtime.meshes).numel(), p.requires_grad) for p in run.model.parameters()]
    total = sum(size for size, _ in sizes) + packed_elements(run.model)
    trainable = sum(size for size, trained in sizes if trained)
    say, checked = run.progress.say, run.checked
    for key in prepared.not_needed:
        say(f"not needed here: {key}")
    for line in prepared.plan.notes:
        say(f"warning: {line}")
    for line in start.refused:
        say(f"refused: {line}")
    for line in (*start.notes, *skipped(prepared.rows)):
        say(line)
    if start.step >= run.total_steps:
        say(f"{start.folder}: this run of {run.total_steps} steps is already finished; raise max_steps to go on")
        return
    changed = changes(prepared.config, start)
    if start.folder is not None:
        say(f"resuming from {start.folder} after step {start.step} of {run.total_steps}")
    for line in changed:
        say(f"changed since step {start.step}: {line}")
    if start.changed_data is not None:
        say(f"changed since step {start.step}: {start.changed_data}")
    if checked is not None:
        say(f"checked: {checked.summary}")
        for line in (*left_out(checked.dropped, checked.examples), *noted(checked.noted, checked.examples)):
            say(line)
    for line in notes:
        say(line)
    asked, started = prepared.config.dataloader.num_workers, data_workers(prepared.config.dataloader.num_workers)
    if started < asked:
        say(f"dataloader.num_workers: {asked} are more than this process has cores; it starts {started}")
    for line in _validation_notes(prepared, validation):
        say(f"validation: {line}")
    say(
        f"{total / 1e6:.1f} M parameters ({trainable / 1e6:.1f} M trained), {len(prepared.rows)} rows, "
        f"{run.total_steps} steps of {run.steps.global_batch_size} rows on {_place(run)}"
    )
    for line in matmul_notes(prepared.config, run.runtime.device):
        say(line)
    never_seen = run.loader.never_seen(run.total_steps)
    if never_seen is not None:
        say(never_seen)
    run.metrics.write(
        "run",
        step=start.step,
        resumed_from=None if start.folder is None else start.folder.name,
        refused=list(start.refused),
        changed=changed,
        changed_data=start.changed_data,
        total_steps=run.total_steps,
        rows=len(prepared.rows),
        skipped_rows=len(prepared.rows.skipped),
        checked_rows=None if checked is None else checked.count,
        **_validation_counts(prepared.validation_rows, validation),
        parameters=total,
        trainable_parameters=trainable,
        versions={"unmask": unmask.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        environment=_environment(run, prepared.config),
    )


def _environment(run: TrainingRun, config: RunConfig) -> dict[str, Any]:
    """Return what the run computes on, for a report."""
    device, processes = run.runtime.device, run.runtime.ranks.size
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": processes,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "peak_flops": float(f"{run.peak.flops:.3g}"),
        "peak_flops_source": run.peak.source,
        "matmuls": matmul_dtype(config, device),
    }


def matmul_notes(config: RunConfig, device: torch.device) -> list[str]:
    """Say in which dtype a run multiplies on a device where that is chosen for it, or is slow there."""
    dtype = matmul_dtype(config, device)
    notes = []
    if config.distributed.autocast_dtype == "auto":
        notes.append(f"matmuls in {dtype} on {device.type} (distributed.autocast_dtype: auto)")
    if idle := idle_tensor_cores(device, dtype):
        notes.append(f"warning: {idle}; set distributed.autocast_dtype: bfloat16")
    return notes


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
            return next(named, "CPU")
    except OSError:
        return "CPU"


def _place(run: TrainingRun) -> str:
    device, processes = run.runtime.device, run.runtime.ranks.size
    return str(device) if processes == 1 else f"{processes} processes ({device.type})"


def changes(config: RunConfig, start: ResumePoint) -> list[str]:
    """Return a line for each field in which a configuration differs from that of the checkpoint it goes on from."""
    if start.folder is None:
        return []
    path = start.folder / "config.yaml"
    try:
        stored = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        return [f"{path} cannot be read, so what changed is not known"]
    return differences(stored, parse_yaml(dump_config(config)))


def skipped(rows: Rows) -> list[str]:
    """Return a line for each of the first ten malformed rows that were skipped, and one with their number."""
    lines = [f"skipped row: {line}" for line in rows.skipped[:10]]
    return [*lines, f"skipped {len(rows.skipped)} malformed rows"] if lines else []


def left_out(dropped: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Return a line for each reason to leave rows out: how many, why, and the first one."""
    return [f"left out {count} rows: {reason} (first: {examples[reason]})" for reason, count in dropped.items()]


def noted(counts: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Return a line for each thing that rows say and nothing learns: how many, what, and the first one."""
    return [f"{count} of the rows read have {note} (first: {examples[note]})" for note, count in counts.items()]


def name_rows(rows: Rows, ids: Sequence[int]) -> str:
    """Return the places of the first 16 rows of a step, and how many more there are."""
    shown = ", ".join(rows.describe(sample) for sample in ids[:16])
    return shown + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")


def _validation_notes(prepared: Prepared, validation: ValidationSet | None) -> list[str]:
    """Say which validation rows are left out, and what is approximate in how their questions will be answered."""
    rows, settings = prepared.validation_rows, prepared.validation_settings
    if rows is None or validation is None:
        return []
    notes = [*skipped(rows), *left_out(validation.dropped, validation.examples)]
    notes += noted(validation.noted, validation.examples)
    return [*notes, settings.note] if settings is not None and settings.note else notes


def _validation_counts(rows: Rows | None, validation: ValidationSet | None) -> dict[str, Any]:
    if rows is None or validation is None:
        return {}
    return {
        "validation_rows": len(rows),
        "validation_skipped_rows": len(rows.skipped),
        "validation_dropped_rows": dict(validation.dropped),
    }


def agreement(prepared: Prepared) -> dict[str, str]:
    """Return what all ranks must have alike, by the name that a message shows."""
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
        "global_batch_size": config.step_scheduler.global_batch_size,
        "seed": [config.seed, config.dataset.shuffle_seed],
        "order": [config.dataloader.shuffle, config.dataloader.group_by_length],
        "answers": config.dataset.answers,
    }
