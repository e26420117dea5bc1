"""What the ranks of a test run: functions that a forked process finds by name."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - this and what follows is imported once, by the server that forks the ranks
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import unmask.assemble
import unmask.training.loop
import unmask.training.network
import unmask.training.saver  # noqa: F401

# A curve takes longer to draw than these runs to train, and has tests of its own.
unmask.assemble.plot_runs = lambda *_, **__: None


def train(values: dict[str, Any]) -> str:
    """Train as `unmask train` does; return how the run ended."""
    from rich.console import Console

    from unmask.assemble import run_training
    from unmask.config import config_from_mapping
    from unmask.prepare import prepare

    return run_training(prepare(config_from_mapping(values)), Console(file=sys.stdout, width=300)).reason


def train_with_slow_rows(values: dict[str, Any], rank: int, seconds: float) -> str:
    """As `train`; one rank takes so long for its share of the rows, each time."""
    from unmask.data import exchange

    original = exchange._next_rows

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds if os.environ["RANK"] == str(rank) else 0)
        return original(*arguments)

    exchange._next_rows = slow
    return train(values)


def command(words: list[str]) -> int:
    """Run a command line as `python -m unmask` does, `{rank}` in it replaced; return its exit status."""
    from unmask.cli import main as run

    return run([word.replace("{rank}", os.environ["RANK"]) for word in words])


def command_with_trouble(words: list[str], rank: int, step: int, trouble: str) -> int:
    """As `command`; one rank gets into trouble when it starts a step."""
    import signal

    from unmask.errors import DataError
    from unmask.training import loop

    original = loop.train_step
    steps = 0

    def train_step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step and os.environ["RANK"] == str(rank):
            if trouble == "error":
                raise DataError("data.jsonl:7: something is wrong with this row")
            if trouble == "bug":
                print(1 // 0)
            if trouble == "disk":
                full_disk()
            else:
                os.kill(os.getpid(), getattr(signal, trouble))
        return original(*arguments)

    loop.train_step = train_step
    return command(words)


def command_with_bad_data(words: list[str], rank: int | None, step: int) -> int:
    """As `command`; a rank, or all of them for None, cannot read a row of some step."""
    from unmask.data.loader import TrainLoader
    from unmask.errors import DataError

    original = TrainLoader.__iter__

    def steps(self: TrainLoader) -> Any:
        for number, batches in enumerate(original(self), start=1):
            if number == step and rank in (None, self.rank):
                raise DataError("data.jsonl:7: something is wrong with this row")
            yield batches

    TrainLoader.__iter__ = steps
    return command(words)


def launched(module: str, words: list[str], processes: int) -> int:
    """Be the launcher of `python -m MODULE` instead of a rank; return its exit status."""
    from unmask.distributed.launch import launch

    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE") or name.startswith("TORCHELASTIC")]:
        del os.environ[name]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.dup2(sys.stderr.fileno(), 2)  # what the ranks print goes where this process prints
    return launch(module, words, processes)


def full_disk() -> None:
    """From now on this process can write no more than a little into a file."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def collectives(_: Any = None) -> dict[str, Any]:
    """Call each of `Ranks`' collectives once."""
    from unmask.distributed.ranks import from_first, join
    from unmask.errors import CheckpointError, ConfigError

    ranks = join(torch.device("cpu"), 1)

    def fail() -> None:
        raise CheckpointError("only rank 0 sees this")

    found: dict[str, Any] = {
        "sum": ranks.sum([1.0, float(ranks.rank)]),
        "largest": ranks.largest(10 * ranks.rank),
        "gather": ranks.gather({"rank": ranks.rank}),
        "tensor": ranks.sum_tensor(torch.tensor([0.5, float(ranks.rank)])).tolist(),
        "from_first": from_first(ranks, lambda: f"rank {ranks.rank}"),
    }
    ranks.agree({"configuration": "same"})
    calls = {"failed": lambda: from_first(ranks, fail), "agree": lambda: ranks.agree({"data": str(ranks.rank)})}
    for name, call in calls.items():
        try:
            call()
        except (CheckpointError, ConfigError) as error:
            found[name] = str(error)
    ranks.barrier()
    assert dist.get_world_size() == ranks.size
    return found


def train_with_slow_copies(values: dict[str, Any], seconds: float) -> str:
    """As `train`; the thread that saves comes late to its copy of the weights."""
    from unmask.training import saver

    saver._device_is_ready = lambda _: lambda: time.sleep(seconds)
    return train(values)


def train_noting_blocks(values: dict[str, Any]) -> set[str]:
    """Train; return the dtypes of the hidden states that go into a block or come out of one."""
    from unmask import assemble as assembly
    from unmask.models.registry import family_of

    build, dtypes = assembly.build_network, set()

    def note(_module: Any, inputs: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        dtypes.update((str(inputs[0].dtype), str(hidden.dtype)))

    def build_noting(*arguments: Any) -> Any:
        network = build(*arguments)
        for block in network.model.get_submodule(family_of(network.model.config).shard.blocks).children():
            block.register_forward_hook(note)
        return network

    assembly.build_network = build_noting
    train(values)
    return dtypes


def offloaded_places(config: dict[str, Any], device: str) -> dict[str, set[str]]:
    """Build a network with offloaded shards that would run on a device; return where its tensors are."""
    from dataclasses import replace

    from unmask.config.distributed import DistributedConfig
    from unmask.config.model import ModelConfig
    from unmask.distributed.processes import Degrees
    from unmask.distributed.runtime import build_runtime
    from unmask.models.registry import plan_model
    from unmask.training.network import build_network

    runtime = build_runtime(DistributedConfig(device="cpu"), Degrees(int(os.environ["WORLD_SIZE"])))
    settings = network_settings(plan_model(ModelConfig(config=config)), DistributedConfig(offload_policy="cpu"))
    pin_nothing()
    model = build_network(settings, replace(runtime, device=torch.device(device))).model
    found = {"parameters": model.parameters(), "buffers": model.buffers()}
    return {kind: {tensor.device.type for tensor in tensors} for kind, tensors in found.items()}


def grouped(config: dict[str, Any], degrees: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Shard a network as a run does; return what FSDP2 holds of it, and where a part of an expert's matrix lies."""
    from unmask.config.distributed import DistributedConfig
    from unmask.config.model import ModelConfig
    from unmask.distributed.processes import Degrees
    from unmask.distributed.runtime import build_runtime
    from unmask.distributed.shard import piece
    from unmask.models.registry import plan_model
    from unmask.training.network import build_network

    section = DistributedConfig(device="cpu", ep_size=degrees[2], **options)
    runtime = build_runtime(section, Degrees(*degrees))
    if section.offload_policy is not None:
        pin_nothing()
    model = build_network(network_settings(plan_model(ModelConfig(config=config)), section), runtime).model
    states = {name: module._get_fsdp_state() for name, module in model.named_modules() if hasattr(module, "reshard")}
    names = {state: name for name, state in states.items()}
    groups = {name: state._fsdp_param_group for name, state in states.items()}
    expert = model.get_parameter("model.decoder.layers.0.experts.down_proj")
    assert runtime.meshes is not None and runtime.meshes.experts is not None
    runtime.meshes.experts._device_type = "meta"  # as a mesh of CUDA devices is to shards on the host
    return {
        "reshards": {
            name: group is not None and group.post_forward_mesh_info is not None for name, group in groups.items()
        },
        "forward": {name: [names[one] for one in state._states_to_forward_prefetch] for name, state in states.items()},
        "backward": {
            name: [names[one] for one in state._states_to_backward_prefetch] for name, state in states.items()
        },
        "shared": piece(expert, runtime.meshes).local.data_ptr() == expert.to_local().data_ptr(),
    }


def train_offloaded(values: dict[str, Any]) -> str:
    """Train with shards, gradients and moments offloaded, from a CPU to the same CPU; return how the run ended."""
    from dataclasses import replace

    from unmask import assemble as assembly

    build = assembly.build_network

    def build_offloaded(settings: Any, runtime: Any) -> Any:
        return build(replace(settings, distributed=replace(settings.distributed, offload_policy="cpu")), runtime)

    assembly.build_network = build_offloaded
    pin_nothing()
    return train(values)


def pin_nothing() -> None:
    """Have offloaded shards in memory of any kind: without an accelerator none can be pinned."""
    from functools import partial

    from unmask.distributed import shard

    shard.CPUOffloadPolicy = partial(torch.distributed.fsdp.CPUOffloadPolicy, pin_memory=False)


def load_peak(folder: str, trained: bool) -> dict[str, int]:
    """Load a checkpoint in shards, to be trained or to answer.

    Returns how far this rank's memory rose meanwhile, and what it holds, in bytes.
    """
    import threading

    from unmask.config.distributed import DistributedConfig
    from unmask.distributed.inference import load_shared
    from unmask.distributed.processes import Degrees
    from unmask.distributed.runtime import build_runtime
    from unmask.models.registry import plan_folder
    from unmask.training.network import build_network

    def anonymous() -> int:  # pages of mapped files are the system's to drop
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    runtime = build_runtime(DistributedConfig(device="cpu"), Degrees(int(os.environ["WORLD_SIZE"])))
    runtime.ranks.barrier()
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    plan = plan_folder(folder, "x")
    if trained:
        model = build_network(network_settings(plan, DistributedConfig()), runtime).model
    else:
        model = load_shared(plan, None, runtime.device, None, runtime.ranks)
    done.set()
    thread.join()
    local = [parameter.to_local() for parameter in model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    total = sum(float(tensor.double().sum()) for tensor in local)
    return {
        "risen": peak - before,
        "shard": sum(tensor.numel() * tensor.element_size() for tensor in local),
        "sum": round(runtime.ranks.sum([total])[0]),
    }


def divide(prompts: list[str]) -> dict[str, list]:
    """Divide rows among ranks; return all results and the rows that this rank was given."""
    from unmask.distributed.inference import divide_rows
    from unmask.distributed.ranks import join

    given: list[str] = []

    def work(rows: list[str]) -> list[str]:
        given.extend(rows)
        return [row.upper() for row in rows]

    return {"all": divide_rows(prompts, join(torch.device("cpu")), work), "given": given}


def measured_run(values: dict[str, Any]) -> dict[str, int]:
    """Train; return the bytes that this rank received through FSDP2 and expert exchange, and what its shards take.

    `buffer` is the largest that a collective of FSDP2 worked in, `checksum` is of its shards' values.
    """
    from rich.console import Console

    from unmask import assemble as assembly
    from unmask.assemble import run_training
    from unmask.config import config_from_mapping
    from unmask.distributed import expert_parallel
    from unmask.prepare import prepare

    received = {"weights": 0, "gradients": 0, "tokens": 0, "buffer": 0}
    gather, scatter, reduce = dist.all_gather_single, dist.reduce_scatter_single, dist.all_reduce
    built: list[Any] = []

    def counted(name: str, tensor: torch.Tensor, group: Any, both: int = 1) -> None:
        size = dist.get_world_size(group)
        received[name] += both * tensor.numel() * tensor.element_size() * (size - 1) // size
        if both == 1:  # gathered, or to be scattered
            received["buffer"] = max(received["buffer"], tensor.numel() * tensor.element_size())

    def all_gather(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, **options: Any) -> Any:
        counted("weights", output_tensor, group)
        return gather(output_tensor, input_tensor, group=group, **options)

    def reduce_scatter(*, output: torch.Tensor, input: torch.Tensor, group: Any, **options: Any) -> Any:
        counted("gradients", input, group)
        return scatter(output=output, input=input, group=group, **options)

    def all_reduce(tensor: torch.Tensor, *rest: Any, group: Any = None, **options: Any) -> Any:
        if group is not None and tensor.numel() > 16:
            counted("gradients", tensor, group, both=2)
        return reduce(tensor, *rest, group=group, **options)

    def build(*arguments: Any) -> Any:
        built.append(original(*arguments))
        return built[-1]

    original = assembly.build_network
    dist.all_gather_single, dist.reduce_scatter_single, dist.all_reduce = all_gather, reduce_scatter, all_reduce
    assembly.build_network = build
    exchange = expert_parallel.all_to_all_single_autograd

    def exchanged(rows: torch.Tensor, receive: list[int], send: list[int], group: Any) -> torch.Tensor:
        own = dist.get_rank(group)
        others = sum(count for rank, count in enumerate(receive) if rank != own)
        received["tokens"] += others * rows[0].numel() * rows.element_size() if len(rows) else 0
        return exchange(rows, receive, send, group)

    expert_parallel.all_to_all_single_autograd = exchanged
    run_training(prepare(config_from_mapping(values)), Console(file=sys.stdout, width=300))

    def size(tensors: Any) -> int:
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in local)

    state = [tensor for tensor in unmask.training.network.moments(built[0]).values() if tensor.dim()]
    parts = [parameter.detach().to_local() for parameter in built[0].model.parameters()]
    checksum = hash(tuple(part.view(torch.uint8).sum().item() for part in parts if part.numel()))
    return {**received, "shard": size(parts), "optimizer": size(state), "checksum": checksum}


def network_settings(plan: Any, section: Any) -> Any:
    """Return the settings of a network in fp32 that is trained whole."""
    from unmask.config.training import OptimizerConfig
    from unmask.training.network import NetworkSettings

    return NetworkSettings(plan, "float32", None, False, section, OptimizerConfig(), 0)


def rewrite(source: str, root: str, experts: int, consolidated: Any) -> None:
    """Load a checkpoint in shards and save it again, in files of at most 20 kB."""
    from functools import partial

    from unmask.config.distributed import DistributedConfig
    from unmask.config.results import CheckpointConfig
    from unmask.distributed import shard
    from unmask.distributed.processes import Degrees
    from unmask.distributed.runtime import build_runtime
    from unmask.models.registry import plan_folder
    from unmask.training import saver
    from unmask.training.network import build_network

    shard.SHARD_BYTES, saver.save_weights = 20_000, partial(saver.save_weights, shard_bytes=20_000)
    section = DistributedConfig(device="cpu", ep_size=experts)
    runtime = build_runtime(section, Degrees(int(os.environ["WORLD_SIZE"]), 1, experts))
    network = build_network(network_settings(plan_folder(source, "x"), section), runtime)
    made = saver.Saver(Path(root), CheckpointConfig(save_consolidated=consolidated), network, runtime, {}, None)
    made.save(1, {}, last=False)
    made.wait()


def exchange(cases: list[tuple[nn.Module, list[tuple[torch.Tensor, ...]]]]) -> list[dict[str, Any]]:
    """Send tokens to experts that all ranks share out; for each case return what came and the gradients of Σ sin."""
    from unmask.distributed.expert_parallel import expert_dispatch, narrow_experts
    from unmask.distributed.ranks import join

    ranks, found = join(torch.device("cpu"), 1), []
    dispatch = expert_dispatch(dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    for experts, given in cases:
        narrow_experts(experts, ranks.rank, ranks.size)
        hidden, chosen, weights = given[ranks.rank]
        rows: list[int] = []
        experts.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
        mixed = dispatch(hidden.requires_grad_(), chosen, weights.requires_grad_(), experts)
        gradients = torch.autograd.grad(mixed.sin().sum(), [hidden, weights, *experts.parameters()])
        found.append({"rows": rows[0], "tensors": [each.detach().clone() for each in (mixed, *gradients)]})
    return found


def timeouts(experts: int) -> dict[str, float]:
    """Make all groups of a run; return how long each of them waits, in seconds, by a name."""
    from torch.distributed.distributed_c10d import _world

    from unmask.config.distributed import DistributedConfig
    from unmask.distributed.processes import Degrees
    from unmask.distributed.runtime import build_runtime

    degrees = Degrees(int(os.environ["WORLD_SIZE"]), 2, experts)
    runtime = build_runtime(DistributedConfig(device="cpu", timeout_minutes=7), degrees)
    apart = runtime.ranks.apart()
    patient = [ranks.patient.group_name for ranks in (runtime.ranks, apart)]
    return {
        ("patient " if group.group_name in patient else "") + group.group_name: seconds_of(group)
        for group in _world.pg_map
    }


def meet_alone(seconds: float) -> str:
    """Make the group that waits for work, to which the other ranks do not come; return the error on rank 0."""
    from unmask.distributed import ranks

    ranks.join(torch.device("cpu"))
    try:
        if int(os.environ["RANK"]) == 0:
            ranks._patient_group(timedelta(seconds=seconds))
    except RuntimeError as error:
        return type(error).__name__
    return ""


def seconds_of(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def train_and_wait(values: dict[str, Any]) -> set[float]:
    """Train; return how long the groups of the run wait, in seconds."""
    from torch.distributed.distributed_c10d import _world

    train(values)
    return {seconds_of(group) for group in _world.pg_map}


def command_with_slow_rank(words: list[str], seconds: float, ending: str) -> int:
    """As `command`, where ranks wait one second; the last one answers its prompts late, or is killed then."""
    import signal

    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    from unmask.evaluation import exact_match
    from unmask.sampling import answers

    original = answers.answer

    def answer(*arguments: Any, **options: Any) -> Any:
        for group in _world.pg_map:  # not before: to start takes longer than that
            if seconds_of(group) < 24 * 3600:
                _set_pg_timeout(timedelta(seconds=1), group)
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            time.sleep(seconds)
            if ending == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    answers.answer = exact_match.sample_answers = answer
    return command(words)


def command_in_own_folder(words: list[str], folder: str) -> int:
    """As `command`, each rank in a working directory of its own, as on machines that share no file system."""
    from unmask.training import run

    run.SEEN_WITHIN = 0.3
    place = Path(folder) / f"machine{os.environ['RANK']}"
    place.mkdir(parents=True)
    os.chdir(place)
    return command(words)


def find_and_count(root: str) -> tuple[str, list[str]]:
    """Look for a run's checkpoint together; return what was found, or the error, and which files this rank read."""
    from unmask.distributed.ranks import join
    from unmask.errors import CheckpointError
    from unmask.models import manifest
    from unmask.training.checkpoint import find_checkpoint

    original, read = manifest.crc32, []

    def crc32(path: Path, *rest: Any) -> int:
        read.append(path.name)
        return original(path, *rest)

    manifest.crc32 = crc32
    try:
        checkpoint = find_checkpoint(Path(root), {}, ranks=join(torch.device("cpu")))
    except CheckpointError as error:
        return str(error), read
    assert checkpoint is not None
    return f"{checkpoint.folder.name} of step {checkpoint.state['step']} {checkpoint.refused}", read


def command_and_groups(words: list[str]) -> tuple[int, bool]:
    """As `command`; return its status and whether this process has still a process group."""
    return command(words), dist.is_initialized()


def command_that_cannot_leave(words: list[str]) -> int:
    """As `command`; to leave the process group hangs, as NCCL may after a failure."""
    from unmask import cli

    cli._END = cli._END_OF_FAILED = 0.2
    dist.destroy_process_group = lambda: time.sleep(600)
    return command(words)


def collective_costs(place: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Run each collective of a training step; return how long it takes and whether its values are right.

    `size`, in bytes, is of the whole tensor: what is gathered, what is summed, what a rank sends to all.
    """
    from unmask.distributed.ranks import join
    from unmask.distributed.runtime import own_device, pick_device

    device = own_device(pick_device(place))
    ranks = join(device, 5)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ranks.barrier()
        return time.perf_counter()

    found = []
    for size in sizes:
        numbers = size // 4
        part = numbers // ranks.size
        own, whole = (torch.full((n,), float(ranks.rank + 1), device=device) for n in (part, numbers))
        everyone = torch.arange(1.0, ranks.size + 1, device=device).repeat_interleave(part)
        total = float(sum(range(1, ranks.size + 1)))
        calls: dict[str, Any] = {
            "all_gather": (
                torch.empty_like(whole), lambda out, own=own: dist.all_gather_into_tensor(out, own), everyone,
            ),
            "reduce_scatter": (
                torch.empty_like(own),
                lambda out, whole=whole: dist.reduce_scatter_tensor(out, whole),
                torch.full_like(own, total),
            ),
            "all_reduce": (
                torch.empty_like(whole),
                lambda out, whole=whole: dist.all_reduce(out.copy_(whole)),
                torch.full_like(whole, total),
            ),
            "all_to_all": (
                torch.empty_like(whole), lambda out, whole=whole: dist.all_to_all_single(out, whole), everyone,
            ),
        }  # fmt: skip
        for name, (out, call, expected) in calls.items():
            call(out)  # connections are made
            seconds = []
            for _ in range(5):
                start = clock()
                call(out)
                seconds.append(clock() - start)
            right = bool(torch.equal(out, expected))
            found.append({"name": name, "size": size, "milliseconds": 1000 * min(seconds), "right": right})
    return found
