"""The device that a run uses and how it computes there: placement, autocast, activation checkpointing, memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from unmask.distributed.mesh import Degrees, Meshes, build_meshes
from unmask.distributed.ranks import ALONE, Ranks, join, local_rank, world_size
from unmask.errors import ConfigError, FieldError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """`distributed.mp_policy`: in which dtypes weights and gradients travel between ranks (FSDP2's policy).

    Attributes:
        param_dtype: dtype in which a rank gathers the others' shards and multiplies them; None = that of the master
            weights. bfloat16 implies `autocast_dtype: bfloat16`, and means no more on one process, which gathers
            nothing.
        reduce_dtype: dtype in which gradients are summed over ranks.
        output_dtype: dtype of the network's final hidden states; None = as computed.
    """

    param_dtype: Literal["float32", "bfloat16"] | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    output_dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True)
class DistributedConfig:
    """Section `distributed`: how the network runs on its device, and how several processes share it.

    Attributes:
        strategy: `fsdp2` shards weights, gradients and optimizer state over the processes (torch's `fully_shard`); one
            process holds everything and wraps nothing.
        dp_size: number of processes, checked against how many were started; None = that many.
        dp_replicate_size: copies of the model, each sharded over the other processes (HSDP).
        ep_size: processes that share out the experts of a mixture and exchange tokens; 1 = experts are gathered like
            everything else.
        tp_size, cp_size, pp_size: tensor, context and pipeline parallelism, of which there is none: 1.
        mp_policy: dtypes in which weights and gradients travel.
        offload_policy: `cpu` keeps shards, gradients and optimizer state in the host's memory.
        defer_grad_sync: sum gradients over ranks once a step, after the last micro-batch, at the cost of a whole
            gradient on each rank meanwhile; false sums them at every micro-batch and holds a shard only.
        autocast_dtype: dtype of matmuls; the master weights keep `model.torch_dtype`. bfloat16 is several times faster
            on GPUs and on CPUs that multiply it in hardware (AMX, AVX512_BF16).
        activation_checkpointing: keep only each block's input for backward and recompute the rest.
        attention: `sdpa` is PyTorch's scaled_dot_product_attention, with its flash kernels; `flex` runs padded and
            packed batches through FlexAttention, compiled, on CUDA devices of compute capability 8.0 or later.
        compile: compile each block with torch.compile, whose kernels do several steps at once: faster after a start of
            a minute or more, on CUDA devices with Triton. Not of a network with experts, whose grouped matmul torch
            does not compile.
        device: `auto` takes a CUDA device when there is one.
        timeout_minutes: how long a rank waits for the others before it gives up.
    """

    strategy: Literal["fsdp2"] = "fsdp2"
    dp_size: int | None = None
    dp_replicate_size: int = 1
    ep_size: int = 1
    tp_size: int = 1
    cp_size: int = 1
    pp_size: int = 1
    mp_policy: MixedPrecisionConfig | None = None
    offload_policy: Literal["cpu"] | None = None
    defer_grad_sync: bool = True
    autocast_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        for name, kind in (("tp_size", "tensor"), ("cp_size", "context"), ("pp_size", "pipeline")):
            if getattr(self, name) != 1:
                raise FieldError(
                    name, f"{getattr(self, name)} is not available: there is no {kind} parallelism here; set it to 1"
                )
        for name in ("dp_size", "dp_replicate_size", "ep_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FieldError(name, f"must be at least 1, got {value}")
        if self.timeout_minutes <= 0:
            raise FieldError("timeout_minutes", f"must be positive, got {self.timeout_minutes}")


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


def own_device(device: torch.device) -> torch.device:
    """Return this process's own device where several processes of one machine share its CUDA devices.

    Raises:
        ConfigError: more processes than devices.
    """
    import torch

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


def build_runtime(section: DistributedConfig, degrees: Degrees | None = None) -> Runtime:
    """Pick the device and compute dtype of a run, and join the other processes if there are any.

    Raises:
        ConfigError: no such device, or the processes cannot meet.
    """
    import torch

    policy = section.mp_policy or MixedPrecisionConfig()
    degrees = degrees or Degrees()
    # A network whose weights are bf16 still has fp32 buffers: autocast brings what meets in a matmul to one dtype.
    compute = torch.bfloat16 if "bfloat16" in (section.autocast_dtype, policy.param_dtype) else None
    device = pick_device(section.device)
    if degrees.world == 1:
        return Runtime(device, compute)
    device = own_device(device)
    if device.type != "cuda" and section.offload_policy is not None:
        raise ConfigError("distributed.offload_policy: cpu is for CUDA devices, and this run is on cpu; set null")
    ranks = join(device, section.timeout_minutes)
    return Runtime(device, compute, ranks, build_meshes(degrees, device.type))


def set_switches(model: nn.Module, section: DistributedConfig, runtime: Runtime) -> None:
    """Switch activation checkpointing and compilation and choose the attention kernel of a network.

    Raises:
        ConfigError: `attention: flex` or `compile` on a device or for a network that cannot train with it.
    """
    from unmask.models.attention import flex_available
    from unmask.models.moe import Experts

    if section.attention == "flex" and not flex_available(runtime.device):
        raise ConfigError(
            f"distributed.attention: flex needs a CUDA device of compute capability 8.0 or later with Triton, and this "
            f"run is on {runtime.device}; set attention: sdpa"
        )
    if section.compile and not compiles_on(runtime.device):
        raise ConfigError(
            f"distributed.compile: needs a CUDA device with Triton, and this run is on {runtime.device}; set false"
        )
    if section.compile and any(isinstance(module, Experts) for module in model.modules()):
        raise ConfigError("distributed.compile: torch does not compile the experts of this network; set false")
    for module in model.modules():
        if hasattr(module, "attention_kernel"):
            module.attention_kernel = section.attention  # pyright: ignore[reportArgumentType]
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = section.activation_checkpointing  # pyright: ignore[reportArgumentType]
            if section.compile:
                compile_blocks(module)


def compiles_on(device: torch.device) -> bool:
    """Say whether torch.compile trains on this device; on a CPU it would need a C++ compiler and gains little."""
    from importlib.util import find_spec

    return device.type == "cuda" and find_spec("triton") is not None


def compile_blocks(stack: nn.Module) -> None:
    """Have the forward pass of each of a stack's blocks compiled when it first runs.

    The method and not the module: what FSDP2 and activation checkpointing hang on a module's call stays outside.
    """
    import torch
    from torch import nn

    for blocks in stack.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.forward = torch.compile(block.forward)


def prepare_model(model: nn.Module, section: DistributedConfig, runtime: Runtime) -> nn.Module:
    """Place a whole network on the device of a run and set its switches; raises ConfigError as `set_switches`."""
    set_switches(model, section, runtime)
    return model.to(runtime.device).train()
