"""What a run needs of each machine: host memory and disk, counted from sizes, beside what this machine has.

Host memory is that of all processes of a machine, at the fullest: while weights load or while a save goes on.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

import torch
from torch import nn

from unmask.config import RunConfig
from unmask.distributed.processes import Degrees, local_size, world_size
from unmask.machine import host_memory
from unmask.models.folders import stored_tensors
from unmask.models.lora.quantized import packed_tensors
from unmask.models.registry import ModelPlan
from unmask.models.weights import SHARD_BYTES
from unmask.places import user_path
from unmask.training.estimate import Estimate, SharedEstimate

# Assumed, not counted: what Python, torch and its libraries take of the host's memory in each process.
PROGRAM_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs of each of its machines.

    Attributes:
        processes: of the run on a machine.
        program: what the program itself takes; an assumption.
        training: what training keeps in host memory: all of it on a CPU, what is offloaded on a CUDA device.
        loading: tensors on their way from the files to the device, or a fresh network before it is moved.
        staging: pinned copies of weights and optimizer state, made by the first save and used by all (`saver`).
        writing: files that processes put together in memory, as safetensors makes them of parts: twice their size.
        checkpoint: one checkpoint on the disk, the whole run's.
        kept: checkpoints there at once, with the one that is written and the best.
        disk: of all of those; a consolidated one has its weights twice for a while.
    """

    processes: int
    program: int
    training: int
    loading: int
    staging: int
    writing: int
    checkpoint: int
    kept: int
    disk: int

    @property
    def host(self) -> int:
        """Bytes of host memory in all."""
        return self.program + self.training + max(self.loading, self.staging + self.writing)


def count_needs(
    config: RunConfig,
    plan: ModelPlan,
    model: nn.Module,
    whole: Estimate,
    shared: SharedEstimate | None,
    degrees: Degrees,
    device: torch.device,
    steps: int,
) -> Needs:
    """Count what a run of so many steps needs of a machine; `model` as for `estimate_memory`.

    Args:
        whole, shared: the estimates for one device, and for one of several ranks (None on one process).
        device: of the kind that the run is on.
    """
    on_cpu = device.type == "cpu"
    processes = local_size() if world_size() > 1 else degrees.world  # of --nproc-per-node, which starts one machine's
    one = shared or whole
    saved = (0 if config.peft is not None else one.weights) + one.optimizer
    offloaded = 0 if shared is None else shared.offloaded
    # Tensors that are on the host already are written from where they are.
    staged = 0 if on_cpu or offloaded or not config.checkpoint.enabled else saved
    parameters = list(model.parameters())
    if plan.folder is None:  # drawn whole, in fp32, on each process; one on a CPU trains what it drew
        loading = 0 if on_cpu and shared is None else 4 * whole.parameters
    else:
        shapes = [p.shape for p in (*parameters, *packed_tensors(model).values())]
        loading = 4 * max(shape.numel() for shape in shapes)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    weights = trained if config.peft is not None else whole.weights + _passed_through(plan)
    checkpoint, kept = weights + whole.optimizer, _kept(config, steps)
    # `write_parts` divides tensors among files by their whole sizes, of which each process writes its part.
    file = min(SHARD_BYTES, saved * degrees.shard) if config.checkpoint.enabled and degrees.world > 1 else 0
    twice = degrees.world > 1 and config.peft is None and config.checkpoint.save_consolidated
    return Needs(
        processes=processes,
        program=processes * PROGRAM_BYTES,
        training=processes * (one.total if on_cpu else offloaded),
        loading=processes * loading,
        staging=processes * staged,
        writing=processes * 2 * file // degrees.shard,
        checkpoint=checkpoint if config.checkpoint.enabled else 0,
        kept=kept,
        disk=(kept * checkpoint + (weights if twice else 0)) if config.checkpoint.enabled else 0,
    )


def _kept(config: RunConfig, steps: int) -> int:
    """Return how many checkpoints are on the disk at once, with the one being written."""
    section, every = config.checkpoint, config.step_scheduler.ckpt_every_steps
    made = 1 if every is None else -(-steps // every)  # one more than these for the end, if it is between
    if section.max_recent_checkpoints is None:
        return made
    return min(made, section.max_recent_checkpoints + 1) + (section.best_metric is not None)


def _passed_through(plan: ModelPlan) -> int:
    """Return the bytes of a checkpoint's tensors that every copy of it has beside the network's."""
    if plan.folder is None or plan.hub_id is not None:  # of a hub id the weights need not be here
        return 0
    stored = stored_tensors(plan.folder)
    passed = [entry for key, entry in stored.items() if plan.family.files.passthrough(key)]
    return sum(math.prod(entry.shape) * _width(entry.dtype) for entry in passed)


def _width(dtype: str) -> int:
    """Return the bytes of a number of a safetensors dtype, such as `BF16` or `F8_E4M3`."""
    bits = "".join(filter(str.isdigit, dtype.partition("_")[0]))
    return int(bits or 8) // 8


def shortages(config: RunConfig, needs: Needs, device_bytes: int, device: torch.device) -> list[str]:
    """Return a warning for each thing of which this machine has less than a run needs of it."""
    found = []
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
        if have < device_bytes:
            found.append(f"warning: a device here has {have / 2**30:.1f} GiB, and a process needs {_gib(device_bytes)}")
    have = host_memory()
    if have < needs.host:
        found.append(
            f"warning: this machine has {have / 2**30:.1f} GiB of memory, and the run needs {_gib(needs.host)}"
        )
    root = user_path(config.checkpoint.checkpoint_dir, "checkpoint.checkpoint_dir").absolute()
    place = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needs.disk:
        found.append(
            f"warning: {place} has {free / 2**30:.1f} GiB free, and the run's checkpoints need {_gib(needs.disk)}; "
            "lower checkpoint.max_recent_checkpoints, or write elsewhere (checkpoint.checkpoint_dir)"
        )
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
