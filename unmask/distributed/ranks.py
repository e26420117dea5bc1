"""The ranks of a run: what all of them decide together on the host, and the device meshes that they form.

Every collective here is the identity with one process, which has no process group.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from unmask.distributed.processes import Degrees, process_rank, world_size
from unmask.errors import ConfigError, TrainingError, UnmaskError

T = TypeVar("T")

_PATIENCE = timedelta(days=365)  # of a rank that waits for work of the others, whose death closes its connections


@dataclass
class Waited:
    """How long a process was in collectives on the host, which is mostly waiting for the slowest of all."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Context whose time is added."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


@dataclass(frozen=True)
class Ranks:
    """What one process knows of the others. Each method is a collective: all ranks call it, in the same order.

    Attributes:
        rank: this process, from 0; rank 0 alone talks and writes logs.
        group: process group for the collectives below; None = the default one.
        patient: process group of `gather_results`, which waits for as long as the other processes live: one that has
            answered its prompts, or has nothing to check or to write, waits for those that have.
        timeout: how long the other collectives wait; also for groups that are made later.
        waited: counts the time in those on the host.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    patient: Any = None
    timeout: timedelta = timedelta(minutes=30)
    waited: Waited = field(default_factory=Waited, init=False, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that talks and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks of a few numbers on the host, in float64; the same list on every rank."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        with self.waited.counting():
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum a tensor over ranks in place, on its own device, and return it."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def largest(self, value: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.int64)
        with self.waited.counting():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, small and picklable, in the order of ranks."""
        return self._gather(value, self.group)

    def gather_results(self, value: Any) -> list[Any]:
        """As `gather`, for values that a rank may work on for any time; the others wait for as long as it lives."""
        return self._gather(value, self.patient)

    def _gather(self, value: Any, group: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.waited.counting():
            dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Return when all ranks are here."""
        self.largest(0)

    def apart(self) -> Ranks:
        """Return the same ranks with process groups of their own, for the collectives of another thread."""
        if self.size == 1:
            return self
        return replace(
            self, group=dist.new_group(backend="gloo", timeout=self.timeout), patient=_patient_group(self.timeout)
        )

    def agree(self, values: Mapping[str, str]) -> None:
        """Refuse ranks that would run different things.

        `values` must be equal, by the name that a message shows: hashes or short texts.

        Raises:
            ConfigError: naming the first difference; the same message on every rank.
        """
        everyone = self.gather(dict(values))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"rank {rank} has another {name} than rank 0 ({theirs.get(name)}, not {value}); start all "
                        "ranks with the same files, arguments and packages"
                    )


ALONE = Ranks()  # a run of one process


def from_first(ranks: Ranks, function: Callable[[], T]) -> T:
    """Return what a function returns on rank 0, which alone calls it; its UnmaskError is raised on every rank.

    A collective; the result is small and picklable.
    """
    if ranks.size == 1:
        return function()
    result: Any = None
    problem: tuple[type[UnmaskError], str] | None = None
    if ranks.first:
        try:
            result = function()
        except UnmaskError as error:
            problem = type(error), str(error)
    result, problem = ranks.gather_results((result, problem))[0]
    if problem is not None:
        error_type, message = problem
        raise error_type(message)
    return result


def join(device: torch.device, timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group that the launcher describes; a run of one process has none.

    Collectives on host tensors go through gloo, those on CUDA tensors through NCCL, and wait for the other ranks for
    `timeout_minutes`, `Ranks.gather_results` excepted.

    Raises:
        ConfigError: the launcher's port is taken, or another variable of the launcher is missing.
        TrainingError: the others did not come within the time.
    """
    size, rank, timeout = world_size(), process_rank(), timedelta(minutes=timeout_minutes)
    if size == 1:
        return Ranks()
    if dist.is_initialized():
        _set_pg_timeout(timeout)
        return Ranks(rank, size, None, _patient_group(timeout), timeout)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        if name not in os.environ:
            raise ConfigError(f"{name}: not set although WORLD_SIZE is {size}; start the run with torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise ConfigError(
                f"MASTER_PORT: port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is in use; choose "
                "another with --master-port, or let torchrun --standalone choose"
            ) from None
        raise TrainingError(_nobody_came(rank, size, timeout_minutes, error)) from None
    except dist.DistStoreError as error:
        raise TrainingError(_nobody_came(rank, size, timeout_minutes, error)) from None
    return Ranks(rank, size, None, _patient_group(timeout), timeout)


def _patient_group(timeout: timedelta) -> Any:
    """Return a group that waits for work without end, but no longer than `timeout` for its members to meet."""
    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    _set_pg_timeout(_PATIENCE, group)
    return group


def _nobody_came(rank: int, size: int, minutes: float, error: Exception) -> str:
    said = str(error).split("\n")[0][:200]
    return (
        f"rank {rank} of {size} did not meet the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
        f"within {minutes:g} minutes ({said}); check that all were started, or raise timeout_minutes"
    )


def leave(seconds: float) -> bool:
    """Leave the process groups, if there are any; return whether that was done in some seconds.

    NCCL first waits for what is under way, which after a failure of another rank may never end.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return True
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def destroy() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread starts with the first one
        dist.destroy_process_group()

    thread = threading.Thread(target=destroy, name="unmask-leave", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


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


def build_meshes(degrees: Degrees, device_type: str, timeout: timedelta = Ranks.timeout) -> Meshes:
    """Make the process groups, whose collectives wait for `timeout`; all ranks call it."""
    shape, names = (degrees.replicate, degrees.shard), ("dp_replicate", "dp_shard")
    skip = 1 if degrees.replicate == 1 else 0
    model = init_device_mesh(device_type, shape[skip:], mesh_dim_names=names[skip:])
    experts = None
    if degrees.experts > 1:
        order = torch.arange(degrees.world).view(degrees.replicate, degrees.spread, degrees.experts).transpose(1, 2)
        experts = DeviceMesh(device_type, order.contiguous(), mesh_dim_names=("dp_replicate", "ep", "dp_spread"))
    for mesh in (model, *(() if experts is None else (experts,))):
        for group in mesh.get_all_groups():  # made with torch's own timeout, for which a mesh has no argument
            _set_pg_timeout(timeout, group)
    return Meshes(degrees, model, experts)
