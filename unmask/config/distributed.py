"""How the network runs on its device, and how several processes share it (`distributed`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmask.errors import FieldError

_YEAR = 525_600  # minutes


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """`distributed.mp_policy`: in which dtypes weights and gradients travel between ranks (FSDP2's policy).

    Attributes:
        param_dtype: in which a rank gathers the others' shards and multiplies them; null = `model.torch_dtype`;
            bfloat16 implies `autocast_dtype: bfloat16`, and means no more on one process, which gathers nothing; the
            residual stream keeps the embedding's dtype
        reduce_dtype: in which gradients are summed over ranks
        output_dtype: of the network's final hidden states; null = as computed
    """

    param_dtype: Literal["float32", "bfloat16"] | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    output_dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True)
class DistributedConfig:
    """Section `distributed`: how the network runs on its device, and how several processes share it.

    Attributes:
        strategy: several processes share weights, gradients and optimizer state (torch's `fully_shard`); one holds
            everything and wraps nothing
        dp_size: number of processes, checked against how many were started; null = that many
        dp_replicate_size: copies of the model, each sharded over the other processes (HSDP); divides the number of
            processes
        ep_size: processes that share out the experts of a mixture and exchange tokens; divides the experts and the
            processes of one copy; 1 gathers experts like everything else
        tp_size: there is no tensor parallelism: 1
        cp_size: there is no context parallelism: 1
        pp_size: there is no pipeline parallelism: 1
        mp_policy: dtypes in which weights and gradients travel, see below
        offload_policy: `cpu` keeps shards, gradients and optimizer state in host memory; several processes on CUDA
            devices only
        reshard_after_forward: free a block's gathered weights after its forward pass and gather them again for
            backward; false keeps those of all blocks until then, which saves a gather and takes the memory of a whole
            network
        reshard_experts_after_forward: the same of experts that `ep_size` shares out and further processes shard; those
            of `ep_size: 1` are gathered with their block
        defer_grad_sync: sum gradients over processes once a step, with a whole gradient on each meanwhile; false sums
            at every micro-batch and holds a shard only
        autocast_dtype: dtype of matmuls; the weights keep `model.torch_dtype`. `auto` takes bfloat16 on CUDA devices
            that multiply it in hardware (compute capability 8.0 or later), and float32 elsewhere; bfloat16 is several
            times faster on CPUs with AMX or AVX512_BF16 too
        activation_checkpointing: keep only each block's input for backward and recompute the rest
        attention: PyTorch's scaled_dot_product_attention with its flash kernels, or FlexAttention, compiled, for padded
            and packed batches; `flex` needs a CUDA device of compute capability 8.0 or later
        compile: compile each block with torch.compile: faster after a start of a minute or more (see
            [performance.md](performance.md)); needs a CUDA device with Triton. Answers sampled during the run are
            compiled too
        device: `auto` takes a CUDA device when there is one
        timeout_minutes: how long a process waits in a step for one that does not answer before it gives up; while
            another checks files, saves or answers, it waits for as long as that one lives
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
    reshard_after_forward: bool = True
    reshard_experts_after_forward: bool = True
    defer_grad_sync: bool = True
    autocast_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
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
        if self.ep_size == 1 and not self.reshard_experts_after_forward:
            raise FieldError(
                "reshard_experts_after_forward",
                "false needs ep_size above 1, without which experts are gathered with their block; set "
                "reshard_after_forward, or leave it out",
            )
        check_timeout(self.timeout_minutes)


def check_timeout(minutes: float) -> None:
    """Raise FieldError for a `timeout_minutes` out of range."""
    if not 0.01 <= minutes <= _YEAR:
        raise FieldError("timeout_minutes", f"must be positive, 0.01 to {_YEAR}, got {minutes}")
