"""How many processes run, which one this is, and how they are to be arranged. Needs no torch.

Degrees: world = replicate × shard; the ranks that share a copy are divided once more, shard = spread × experts, for the
experts of a mixture: each expert lives on the `spread` ranks that have the same place among `experts` neighbours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from unmask.config.distributed import DistributedConfig
from unmask.errors import ConfigError
from unmask.machine import cores

_INTERVAL = 0.5  # seconds between two looks at the launcher
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds from SIGTERM to SIGKILL; torchrun reads it
STATUS_FILE = "UNMASK_STATUS_FILE"  # where rank 0 leaves its exit status: a launcher that was signalled keeps none


def _from_launcher(name: str, default: int, least: int) -> int:
    given = os.environ.get(name, str(default))
    if not given.isdecimal() or int(given) < least:
        raise ConfigError(f"{name}: the launcher set it to {given!r}, which is no whole number from {least} on")
    return int(given)


def world_size() -> int:
    """Return the number of processes that the launcher (torchrun) started; 1 without a launcher."""
    return _from_launcher("WORLD_SIZE", 1, 1)


def several_processes() -> bool:
    """Say whether a launcher started others beside this process; False where its variables are wrong."""
    try:
        return world_size() > 1
    except ConfigError:
        return False


def process_rank() -> int:
    """Return this process's number among them, from 0."""
    return _from_launcher("RANK", 0, 0)


def local_rank() -> int:
    """Return this process's number on its machine, from 0; it picks the CUDA device."""
    return _from_launcher("LOCAL_RANK", 0, 0)


def local_size() -> int:
    """Return how many processes the launcher started on this machine."""
    return _from_launcher("LOCAL_WORLD_SIZE", 1, 1)


def check_restarts(checkpoints: bool) -> None:
    """Refuse torchrun's restarts after a failure where the processes could not go on.

    Args:
        checkpoints: whether the run saves any.

    Raises:
        ConfigError: nothing would be resumed, or the new processes would look for each other where the dead ones did.
    """
    restarts = _from_launcher("TORCHELASTIC_MAX_RESTARTS", 0, 0)
    if restarts and not checkpoints:
        raise ConfigError(
            f"checkpoint.enabled: false, and torchrun starts again after a failure (--max-restarts {restarts}), where "
            "a run goes on from a checkpoint; set true, or leave --max-restarts out"
        )
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "--max-restarts: torch 2.13 starts again with the store of the processes that failed, whose addresses are "
            "still in it; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and start torchrun with --standalone or "
            "--rdzv-backend c10d, or leave --max-restarts out"
        )


def data_workers(asked: int) -> int:
    """Return how many of the data workers that were asked for this rank starts: at the most its share of the cores."""
    return min(asked, max(1, cores() // local_size()))


def end_with_launcher() -> None:
    """Let this process end when the launcher (torchrun) that started it is killed, of which nothing else tells it.

    It gets SIGTERM, as the launcher would have sent it, so that training saves; and as much time for that.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:  # a process whose parent died, however it did, gets another
        time.sleep(_INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(int(os.environ.get(SHUTDOWN_TIMEOUT, "30")))
    os._exit(1)


def leave_status(status: int) -> None:
    """Note rank 0's exit status for the launcher that started it, if `launch.launch` did."""
    note = os.environ.get(STATUS_FILE)
    if note is not None and os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError):  # the launcher was killed and its folder removed
            Path(note).write_text(str(status))


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
    """Check the section's degrees against the number of ranks and of experts a layer (None for a model without).

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


def experts_in_place(section: DistributedConfig, degrees: Degrees) -> bool:
    """Say whether all that FSDP2 would do for experts is to copy them: no other rank has a part of those held here.

    Offloaded, it brings them to the device; and without checkpointing it frees what it narrowed until backward.
    """
    narrowed = section.mp_policy is not None and section.mp_policy.param_dtype is not None
    copied = section.offload_policy is None and (section.activation_checkpointing or not narrowed)
    return copied and degrees.experts > 1 and degrees.replicate * degrees.spread == 1
