"""One training step on 1, 2 and 4 processes that share the machine's cores: time, communication, memory, saving.

The global batch is the same on every number of processes, threads are divided among them. Communication is the time
that rank 0 spends in collectives, waiting for the others included. A save is measured twice: alone, from its beginning
until the checkpoint is complete, which is how long a synchronous one would hold training up; and beside training, where
the pause is what it did hold training up, in the call and before the next update. On a CPU the two share cores, so the
steps made during a save are slower as well; their time is given beside that of the others.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.distributed.ranks import Ranks
    from unmask.training.saver import Saver

PROCESSES = (1, 2, 4)
ROWS, LENGTH, STEPS, SAVES = 8, 128, 6, 3
MODEL = {
    "model_type": "llada", "d_model": 384, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 1536, "vocab_size": 16384,
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
    lines = ["processes   step      × one   communication   shards MB   state MB   save s   pause   steps during it"]
    for number, found in results["processes"].items():
        lines.append(
            f"{number:>9}   {found['step']:.3f} s   {found['step'] / one['step']:5.2f}   "
            f"{found['communication']:12.0%}   {found['shards'] / 1e6:9.1f}   {found['state'] / 1e6:8.1f}   "
            f"{found['save']:6.3f}   {found['pause'] / found['save']:5.1%}   × {found['meanwhile'] / found['step']:.2f}"
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


def _worker(note: Path) -> None:
    import torch

    from unmask.batch import Batch
    from unmask.config.distributed import DistributedConfig
    from unmask.config.model import ModelConfig
    from unmask.config.results import CheckpointConfig
    from unmask.config.training import OptimizerConfig
    from unmask.distributed.processes import Degrees, world_size
    from unmask.distributed.ranks import leave
    from unmask.distributed.runtime import build_runtime
    from unmask.models.registry import plan_model
    from unmask.objectives.mdlm import MDLM
    from unmask.rng import NoiseStream
    from unmask.training.network import NetworkSettings, build_network
    from unmask.training.saver import Saver
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
        seed=0,
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

    def step() -> tuple[float, float]:
        watch.seconds, began = 0.0, time.perf_counter()
        train_step(network.model, MDLM(16383), [batch], NoiseStream(0), network.optimizer, runtime, 1.0)
        taken = time.perf_counter() - began
        return taken, watch.seconds / taken

    steps = [step() for _ in range(STEPS)][2:]
    saver = Saver(root, CheckpointConfig(save_consolidated=False), network, runtime, {}, None)
    saves = _saves(saver, lambda: step()[0], runtime.ranks)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in network.model.parameters()]  # pyright: ignore
    if runtime.ranks.first:
        found = {
            "step": statistics.median(taken for taken, _ in steps),
            "communication": statistics.median(share for _, share in steps),
            "shards": (shards := sum(tensor.numel() * tensor.element_size() for tensor in local)),
            "state": 3 * runtime.ranks.size * shards,  # with AdamW's moments, over all ranks
            **saves,
            "peak_gib": runtime.memory_gib(),
        }
        note.write_text(json.dumps(found))
    leave(60)


def _saves(saver: Saver, step: Callable[[], float], ranks: Ranks) -> dict[str, float]:
    """Measure saves: the first makes buffers and imports modules, SAVES are made alone and as many beside training."""
    alone, pauses, meanwhile = [], [], []
    for number in range(1 + SAVES):
        began = time.perf_counter()
        saver.save(number, {}, last=False)
        saver.wait()
        alone.append(time.perf_counter() - began)
    saver.poll()
    for number in range(1 + SAVES, 1 + 2 * SAVES):
        ranks.barrier()
        saver.save(number, {}, last=False)
        meanwhile.append(step())
        saver.wait()
        pauses.extend(news["pause_seconds"] for news in saver.poll())
    return {
        "save": statistics.median(alone[1:]),
        "pause": statistics.median(pauses),
        "meanwhile": statistics.median(meanwhile),
    }


if __name__ == "__main__":
    _worker(Path(os.environ["UNMASK_SCALING"]))
