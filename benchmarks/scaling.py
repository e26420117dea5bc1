"""One training step on 1, 2 and 4 processes that share the machine's cores: time, communication, memory, saving.

The global batch is the same on every number of processes, threads are divided among them. Communication is the time
that rank 0 spends in collectives, waiting for the others included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROCESSES = (1, 2, 4)
ROWS, LENGTH, STEPS = 8, 128, 7
MODEL = {
    "model_type": "llada", "d_model": 256, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 1024, "vocab_size": 16384,
    "max_sequence_length": LENGTH, "mask_token_id": 16383, "eos_token_id": 16382, "pad_token_id": 16382,
}  # fmt: skip


def run() -> dict[str, Any]:
    """Measure each number of processes in processes of their own."""
    results = {}
    for number in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / "result.json"
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number)),
                "UNMASK_SCALING": str(note),
            }
            words = [sys.executable, "-m", "benchmarks.scaling"]
            if number > 1:
                launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
                words = [sys.executable, "-m", *launcher, "-m", "benchmarks.scaling"]
            subprocess.run(words, env=environment, check=True, stderr=subprocess.DEVNULL)
            results[str(number)] = json.loads(note.read_text())
    return {"cores": os.cpu_count(), "rows": ROWS, "length": LENGTH, "processes": results}


def table(results: dict[str, Any]) -> str:
    """Return the results as a table, times as ratios to one process."""
    one = results["processes"]["1"]
    lines = ["processes   step      × one   communication   shards MB   save s   pause"]
    for number, found in results["processes"].items():
        lines.append(
            f"{number:>9}   {found['step']:.3f} s   {found['step'] / one['step']:5.2f}   "
            f"{found['communication']:12.0%}   {found['shards'] / 1e6:9.1f}   "
            f"{found['save']:6.3f}   {found['pause'] / found['save']:5.0%}"
        )
    return "\n".join(lines)


class _Stopwatch:
    """Adds up the time spent in torch.distributed's collectives."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.seconds = 0.0
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, collective: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return collective(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


class _NoTokenizer:
    chat_template = None

    def save_pretrained(self, folder: Path) -> None:
        """Write nothing: what is measured is the weights."""


def _worker(note: Path) -> None:
    import torch

    from unmask.batch import Batch
    from unmask.distributed.mesh import Degrees
    from unmask.distributed.ranks import leave, world_size
    from unmask.distributed.runtime import DistributedConfig, build_runtime
    from unmask.models.registry import ModelConfig, plan_model
    from unmask.objectives.mdlm import MDLM
    from unmask.rng import NoiseStream
    from unmask.training.checkpoint import CheckpointConfig
    from unmask.training.network import NetworkSettings, build_network
    from unmask.training.optim import OptimizerConfig
    from unmask.training.step import train_step

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    section = DistributedConfig(device="cpu")
    runtime = build_runtime(section, Degrees(world_size()))
    root = note.parent
    plan = plan_model(ModelConfig(config=dict(MODEL)))
    settings = NetworkSettings(
        plan=plan,
        dtype="float32",
        peft=None,
        distributed=section,
        optimizer=OptimizerConfig(),
        checkpoint=CheckpointConfig(save_consolidated=False),
        seed=0,
        root=root,
        tokenizer=_NoTokenizer(),
        template="",
        run_config="",
        freeze_router=False,
    )
    network = build_network(settings, runtime)
    watch = _Stopwatch()
    ids = torch.randint(0, 16000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    own = torch.arange(runtime.ranks.rank, ROWS, runtime.ranks.size)
    whole = torch.ones(len(own), LENGTH, dtype=torch.bool)
    batch = Batch(
        input_ids_BL=ids[own],
        attention_mask_BL=whole,
        supervised_BL=whole,
        answer_lengths_B=whole.sum(dim=1),
        sample_ids_B=own,
        epoch=0,
        slots_B=own,
        global_rows=ROWS,
        cut_B=torch.zeros(len(own), dtype=torch.bool),
        peers_P=torch.arange(ROWS),
    )
    seconds, shares = [], []
    for _ in range(STEPS):
        watch.seconds, began = 0.0, time.perf_counter()
        train_step(network.model, MDLM(16383), [batch], NoiseStream(0), network.optimizer, runtime, 1.0)
        seconds.append(time.perf_counter() - began)
        shares.append(watch.seconds / seconds[-1])
    saver = network.saver(None)
    for step in (1, 2):  # the first one makes threads and buffers
        began = time.perf_counter()
        saver.save(step, {}, last=False)
        pause = time.perf_counter() - began
        saver.settle()
        save = time.perf_counter() - began
    local = [p.to_local() if hasattr(p, "to_local") else p for p in network.model.parameters()]  # pyright: ignore
    if runtime.ranks.first:
        found = {
            "step": statistics.median(seconds[2:]),
            "communication": statistics.median(shares[2:]),
            "shards": sum(tensor.numel() * tensor.element_size() for tensor in local),
            "save": save,
            "pause": pause,
            "peak_gib": runtime.memory_gib(),
        }
        note.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    _worker(Path(os.environ["UNMASK_SCALING"]))
