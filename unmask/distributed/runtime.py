"""The device that a run uses and how it computes there: placement, autocast, activation checkpointing, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from unmask.config import RunConfig
from unmask.config.distributed import DistributedConfig, MixedPrecisionConfig
from unmask.distributed.processes import Degrees, local_rank, world_size
from unmask.distributed.ranks import ALONE, Meshes, Ranks, build_meshes, join
from unmask.errors import ConfigError
from unmask.models.experts import Experts
from unmask.models.lora.experts import AdaptedExperts

# Ways in which blocks are called, at most; PyTorch no longer compiles what comes after the eighth unless it is told.
_WAYS = 32
# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Whoever sets one of these has chosen how memory is allocated.
_CHOICES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True)
class Runtime:
    """What the training step needs to know of the machine.

    Attributes:
        device: where model and batches live.
        compute_dtype: dtype of matmuls under autocast; None = the weights' own.
        ranks: the processes of the run; one, unless a launcher started more.
        meshes: how several ranks share the model; None for one.
    """

    device: torch.device
    compute_dtype: torch.dtype | None
    ranks: Ranks = ALONE
    meshes: Meshes | None = None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the network and the loss run."""
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def memory_gib(self) -> float:
        """Return the peak memory so far in GiB: allocated on a CUDA device, resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return _peak_resident_gib()


def _peak_resident_gib() -> float:
    # Linux keeps ru_maxrss across exec, so it would report a large parent's memory; VmHWM starts afresh.
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


def pick_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`; ConfigError when there is no CUDA device to take."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device: cuda was asked for, but torch sees no CUDA device; use --device cpu (training: distributed.device)"
        )
    return torch.device(name)


def own_device(device: torch.device) -> torch.device:
    """Return this process's own device where several processes of one machine share its CUDA devices.

    Raises:
        ConfigError: more processes than devices.
    """
    if device.type != "cuda" or world_size() == 1:
        return device
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"--nproc-per-node: there are {torch.cuda.device_count()} CUDA devices for process {local_rank()} of "
            "this machine (counted from 0); start one process a device"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def autocast_dtype(section: DistributedConfig, device: torch.device) -> torch.dtype | None:
    """Return the dtype of a run's matmuls under autocast; None = no autocast, the weights' own."""
    chosen = section.autocast_dtype
    if chosen == "auto":
        # A Turing or older GPU multiplies bf16 without its tensor cores, slower than fp32.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = "bfloat16" if fast else "float32"
    policy = section.mp_policy or MixedPrecisionConfig()
    # A network whose weights are bf16 still has fp32 buffers: autocast brings what meets in a matmul to one dtype.
    return torch.bfloat16 if "bfloat16" in (chosen, policy.param_dtype) else None


def fast_bf16() -> bool:
    """Say whether this CPU multiplies bf16 matrices in hardware; where it does not, fp32 is the faster of the two.

    Of training steps of the quickstart's size an AMD Zen 5 with AVX512_BF16 makes 1.7 times as many in bf16.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def matmul_dtype(config: RunConfig, device: torch.device) -> str:
    """Return the name of the dtype that a run multiplies in on a device."""
    autocast = autocast_dtype(config.distributed, device)
    return config.model.torch_dtype if autocast is None else str(autocast).removeprefix("torch.")


def idle_tensor_cores(device: torch.device, dtype: str) -> str | None:
    """Say what is lost where matmuls in a dtype leave a CUDA device's tensor cores idle; None elsewhere.

    torch multiplies float32 on them in TF32 alone, and that only where it is switched on.
    """
    if device.type != "cuda" or dtype != "float32" or torch.get_float32_matmul_precision() != "highest":
        return None
    return "matmuls in float32 without TF32 leave the device's tensor cores idle, and are several times slower"


def build_runtime(section: DistributedConfig, degrees: Degrees | None = None) -> Runtime:
    """Pick the device and compute dtype of a run, and join the other processes if there are any.

    Raises:
        ConfigError: no such device, or the processes cannot meet.
    """
    degrees = degrees or Degrees()
    device = pick_device(section.device)
    compute = autocast_dtype(section, device)
    if device.type == "cuda":
        # Under a mask cuDNN's backward pass gives NaN at lengths of 64 mod 128 on Hopper (pytorch issue 196678, torch
        # 2.11 to 2.13); PyTorch's own flash and memory-efficient kernels take what it took.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if degrees.world == 1:
        return Runtime(device, compute)
    device = own_device(device)
    if device.type != "cuda" and section.offload_policy is not None:
        raise ConfigError("distributed.offload_policy: cpu is for CUDA devices, and this run is on cpu; set null")
    ranks = join(device, section.timeout_minutes)
    return Runtime(device, compute, ranks, build_meshes(degrees, device.type, ranks.timeout))


def set_switches(model: nn.Module, section: DistributedConfig, runtime: Runtime) -> None:
    """Switch activation checkpointing and compilation and choose the attention kernel of a network.

    Raises:
        ConfigError: `attention: flex` or `compile` on a device that cannot train with it.
    """
    if section.attention == "flex" and not flex_available(runtime.device):
        raise ConfigError(
            f"distributed.attention: flex needs a CUDA device of compute capability 8.0 or later with Triton, and this "
            f"run is on {runtime.device}; set attention: sdpa"
        )
    if section.compile and not compiles_on(runtime.device):
        raise ConfigError(
            f"distributed.compile: needs a CUDA device with Triton, and this run is on {runtime.device}; set false"
        )
    for module in model.modules():
        if hasattr(module, "attention_kernel"):
            module.attention_kernel = section.attention  # pyright: ignore[reportArgumentType]
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = section.activation_checkpointing  # pyright: ignore[reportArgumentType]
            if section.compile:
                compile_blocks(module)


def flex_available(device: torch.device) -> bool:
    """Say whether FlexAttention trains on this device: CUDA of compute capability 8.0 (Ampere) or later, with Triton.

    Its kernels are compiled; elsewhere PyTorch has a slow reference or no backward pass (Dong et al. 2024,
    arXiv 2412.05496; torch.nn.attention.flex_attention).
    """
    return compiles_on(device) and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8


def compiles_on(device: torch.device) -> bool:
    """Say whether torch.compile trains on this device; on a CPU it would need a C++ compiler and gains little."""
    return device.type == "cuda" and find_spec("triton") is not None


def compile_blocks(stack: nn.Module) -> None:
    """Have the forward pass of each of a stack's blocks compiled when it first runs.

    The method and not the module: what FSDP2 and activation checkpointing hang on a module's call stays outside. So
    does the exchange of tokens between ranks, on which experts compile by themselves.

    Blocks of one kind share what is compiled, once for each way in which they are called (as encoder or decoder, with
    gradients or without), for inputs of every length.
    """
    for blocks in stack.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            for module in block.modules():
                if module is block or isinstance(module, (Experts, AdaptedExperts)):
                    options: dict[str, Any] = {"dynamic": True, "recompile_limit": _WAYS}
                    module.forward = torch.compile(module.forward, **options)


def synchronise_gradients(model: nn.Module, now: bool) -> None:
    """Say whether a sharded network's next backward pass sums gradients over ranks, or leaves that to a later one."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDPModule, whose import takes seconds
        model.set_requires_gradient_sync(now)  # pyright: ignore[reportCallIssue]
        model.set_is_last_backward(now)  # pyright: ignore[reportCallIssue]


def free_gathered(model: nn.Module) -> None:
    """Make a sharded network's gathered parameters shards again, after a forward pass without backward."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for what is allocated next; return whether it does.

    glibc takes large blocks from the system one by one and gives each back when it is freed, so that a training step on
    a CPU, which makes and drops gradients and logits of hundreds of MB, pays a page fault for every 4 KB of them: with
    a large vocabulary a tenth of its time. Kept, they cost it once. The resident set then stays near its peak until the
    process ends, so this is for processes of our own that train.

    Other C libraries (musl, macOS, Windows) are left as they are, and so is a process whose environment says how
    memory is allocated (`MALLOC_TRIM_THRESHOLD_` and the like, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    if any(os.environ.get(name) for name in _CHOICES):
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        library.gnu_get_libc_version  # noqa: B018 (musl has a mallopt that does nothing)
    except (AttributeError, OSError, TypeError):
        return False
    # Blocks come from the heap, however large, and the heap never shrinks.
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
