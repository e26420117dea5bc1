"""The device that a run uses and how it computes there: placement, autocast, activation checkpointing, memory."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from unmask.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class DistributedConfig:
    """Section `distributed`: how the network runs on its device.

    Attributes:
        autocast_dtype: dtype of matmuls; the master weights keep `model.torch_dtype`. bfloat16 is several times faster
            on GPUs and on CPUs with AMX.
        activation_checkpointing: keep only each block's input for backward and recompute the rest.
        attention: `sdpa` is PyTorch's scaled_dot_product_attention, with its flash kernels; `flex` runs padded and
            packed batches through FlexAttention, compiled, on CUDA devices of compute capability 8.0 or later.
        device: `auto` takes a CUDA device when there is one.
    """

    autocast_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def world_size() -> int:
    """Return the number of processes that the launcher (torchrun) started; 1 without a launcher. Needs no torch."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal():
        raise ConfigError(f"WORLD_SIZE: the launcher set it to {given!r}, which is no number of processes")
    return int(given)


def refuse_many_processes(processes: int) -> None:
    """Raise ConfigError for more than one process: training runs on one device."""
    if processes > 1:
        raise ConfigError(
            f"{processes} processes were asked for, but training runs on one device; start it without torchrun and "
            "without --nproc-per-node, and raise step_scheduler.global_batch_size by accumulation instead"
        )


@dataclass(frozen=True)
class Runtime:
    """What the training step needs to know of the machine.

    Attributes:
        device: where model and batches live.
        compute_dtype: dtype of matmuls under autocast; None = the weights' own.
    """

    device: torch.device
    compute_dtype: torch.dtype | None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the network and the loss run."""
        import torch

        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def memory_gib(self) -> float:
        """Return the peak memory so far in GiB: allocated on a CUDA device, resident set on a CPU."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return _peak_resident_gib()


def _peak_resident_gib() -> float:
    import resource
    import sys

    # Linux keeps ru_maxrss across exec, so it would report a large parent's memory; VmHWM starts afresh.
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


def pick_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`; ConfigError when there is no CUDA device to take."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device: cuda was asked for, but torch sees no CUDA device; use --device cpu (training: distributed.device)"
        )
    return torch.device(name)


def build_runtime(section: DistributedConfig) -> Runtime:
    """Pick the device and compute dtype of a run."""
    import torch

    compute = None if section.autocast_dtype == "float32" else torch.bfloat16
    return Runtime(pick_device(section.device), compute)


def prepare_model(model: nn.Module, section: DistributedConfig, runtime: Runtime) -> nn.Module:
    """Place a network for training, switch activation checkpointing and choose its attention kernel.

    Raises:
        ConfigError: `attention: flex` on a device that cannot train with it.
    """
    from unmask.models.attention import flex_available

    if section.attention == "flex" and not flex_available(runtime.device):
        raise ConfigError(
            f"distributed.attention: flex needs a CUDA device of compute capability 8.0 or later with Triton, and this "
            f"run is on {runtime.device}; set attention: sdpa"
        )
    for module in model.modules():
        if hasattr(module, "attention_kernel"):
            module.attention_kernel = section.attention  # pyright: ignore[reportArgumentType]
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = section.activation_checkpointing  # pyright: ignore[reportArgumentType]
    return model.to(runtime.device).train()
