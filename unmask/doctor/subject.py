"""What is examined: this machine alone, a run's configuration on it, or a checkpoint; read as far as it can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmask.config import LoadedConfig, RunConfig
from unmask.config.objective import DllmConfig
from unmask.distributed.runtime import matmul_dtype, pick_device
from unmask.errors import UnmaskError
from unmask.models.folders import stored_tensors
from unmask.models.registry import ModelPlan, plan_folder
from unmask.objectives.registry import OBJECTIVES, Objective, build_objective, most_padding
from unmask.prepare import Prepared, prepare

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """What is examined; a part that could not be read is None, and `problem` says why.

    Attributes:
        name: what the user named; None = the machine alone.
        device: where it would run.
        plan: the model, weights not loaded.
        prepared: the run, if a configuration was named.
        problem: the first error; "" where all was read.
    """

    name: str | None
    device: torch.device
    plan: ModelPlan | None = None
    prepared: Prepared | None = None
    problem: str = ""

    @property
    def config(self) -> RunConfig | None:
        """The run's configuration; None without one."""
        return None if self.prepared is None else self.prepared.config

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matmuls: the run's, or that of most stored weights."""
        if self.config is not None:
            return getattr(torch, matmul_dtype(self.config, self.device))
        if self.plan is None or self.plan.folder is None:
            return torch.float32
        sizes: dict[str, int] = {}
        for stored in stored_tensors(self.plan.folder).values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return _DTYPES.get(max(sizes, key=sizes.__getitem__, default="F32"), torch.float32)

    @property
    def objective(self) -> Objective:
        """The run's objective, or one that trains the model's family, with its defaults."""
        assert self.plan is not None
        return build_objective(self._section, self.plan.config)

    @property
    def length(self) -> int:
        """Tokens of a row: the run's, or as many as the model takes, up to 1024."""
        assert self.plan is not None
        if self.config is not None:
            return self.config.dataset.seq_length
        room = self.plan.config.max_sequence_length - most_padding(self._section, self.plan.config)
        return min(1024, room)

    @property
    def _section(self) -> DllmConfig:
        assert self.plan is not None
        if self.config is not None:
            return self.config.dllm
        kind = self.plan.family.noise, self.plan.family.attention
        return DllmConfig(mode=next(mode for mode, each in OBJECTIVES.items() if (each.noise, each.attention) == kind))


def machine() -> Subject:
    """Return this machine alone."""
    return Subject(None, pick_device("auto"))


def checkpoint(name: str) -> Subject:
    """Return a checkpoint: a folder, run directory or hub id, of which the weights need not be here."""
    try:
        return Subject(name, pick_device("auto"), plan_folder(name, "doctor", weights=False))
    except UnmaskError as error:
        return unread(name, error)


def run(name: str, loaded: LoadedConfig, processes: int | None) -> Subject:
    """Return the run that a configuration describes, checked as `unmask train --dry-run` does."""
    try:
        device = pick_device(loaded.config.distributed.device)
        prepared = prepare(loaded, weights=False, processes=processes)
    except UnmaskError as error:
        return unread(name, error)
    return Subject(name, device, prepared.plan, prepared)


def unread(name: str, error: UnmaskError) -> Subject:
    """Return a subject that cannot be read."""
    return Subject(name, pick_device("auto"), problem=str(error))
