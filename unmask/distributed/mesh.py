"""The arrangement of ranks: how many hold a copy of the model, how many share one, how many share the experts.

Degrees: world = replicate × shard; the ranks that share a copy are divided once more, shard = spread × experts, for the
experts of a mixture: each expert lives on the `spread` ranks that have the same place among `experts` neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unmask.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from unmask.config.distributed import DistributedConfig


@dataclass(frozen=True)
class Degrees:
    """How the ranks are divided.

    Attributes:
        world: all ranks.
        replicate: copies of the model (HSDP); gradients are summed over them after each copy has summed its own.
        experts: ranks that share out the experts among them; 1 = experts are sharded like everything else.
    """

    world: int = 1
    replicate: int = 1
    experts: int = 1

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the model."""
        return self.world // self.replicate

    @property
    def spread(self) -> int:
        """Ranks that share one expert's matrices."""
        return self.shard // self.experts


def resolve_degrees(section: DistributedConfig, world: int, num_experts: int | None) -> Degrees:
    """Check the section's degrees against the number of ranks and the model; needs no torch.

    Args:
        section: the `distributed` section.
        world: number of ranks.
        num_experts: experts a layer of the model; None for a model without.

    Raises:
        ConfigError: degrees that do not multiply to the number of ranks, or experts that they do not divide.
    """
    started = f"this run has {world} process{'' if world == 1 else 'es'}"
    if section.dp_size not in (None, world):
        raise ConfigError(
            f"distributed.dp_size: {section.dp_size}, but {started}; leave it null, or start with --nproc-per-node "
            f"{section.dp_size}"
        )
    if world % section.dp_replicate_size:
        raise ConfigError(
            f"distributed.dp_replicate_size: {section.dp_replicate_size} does not divide the number of processes, "
            f"{world}; {started}; start a multiple of it with --nproc-per-node, or set it to 1"
        )
    shard = world // section.dp_replicate_size
    if section.ep_size > 1:
        if num_experts is None:
            raise ConfigError(f"distributed.ep_size: {section.ep_size}, but the model has no experts; set it to 1")
        if num_experts % section.ep_size:
            raise ConfigError(
                f"distributed.ep_size: {section.ep_size} does not divide the model's {num_experts} experts"
            )
        if shard % section.ep_size:
            raise ConfigError(
                f"distributed.ep_size: {section.ep_size} does not divide the {shard} ranks that share one copy of the "
                f"model (processes / dp_replicate_size); {started}; start a multiple with --nproc-per-node, or set "
                "ep_size to 1"
            )
    if section.offload_policy is not None and world == 1:
        raise ConfigError("distributed.offload_policy: needs more than one process, which share the model; set null")
    return Degrees(world, section.dp_replicate_size, section.ep_size)


@dataclass(frozen=True)
class Meshes:
    """The device meshes of a run of several ranks.

    Attributes:
        degrees: their sizes.
        model: what everything but the experts is sharded over: (dp_shard,) or (dp_replicate, dp_shard).
        experts: with expert parallelism (dp_replicate, ep, dp_spread), else None. Ranks of one `ep` group are
            neighbours, so that the exchange of tokens stays within a machine where it can.
    """

    degrees: Degrees
    model: DeviceMesh
    experts: DeviceMesh | None

    @property
    def experts_data(self) -> Any:
        """The part of `experts` that FSDP shards over: without `ep`, along which no gradient is summed."""
        assert self.experts is not None
        names = ("dp_replicate", "dp_spread") if self.degrees.replicate > 1 else ("dp_spread",)
        return self.experts[names if len(names) > 1 else names[0]]


def build_meshes(degrees: Degrees, device_type: str) -> Meshes:
    """Make the process groups; all ranks call it."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if degrees.replicate > 1:
        model = init_device_mesh(
            device_type, (degrees.replicate, degrees.shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
    else:
        model = init_device_mesh(device_type, (degrees.shard,), mesh_dim_names=("dp_shard",))
    experts = None
    if degrees.experts > 1:
        order = torch.arange(degrees.world).view(degrees.replicate, degrees.spread, degrees.experts).transpose(1, 2)
        experts = DeviceMesh(device_type, order.contiguous(), mesh_dim_names=("dp_replicate", "ep", "dp_spread"))
    return Meshes(degrees, model, experts)
