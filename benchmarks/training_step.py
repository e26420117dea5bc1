"""A whole LLaDA training step, ours against logits for every position with torch's default AdamW and clipping.

A second baseline is our step with `torch.nn.functional.linear_cross_entropy` as its loss, over the masked positions
alone and with chunks as large as ours; a loss for each row, which weights need, has it make the logits twice.

One process a variant, because peak memory is a process's own; the variants alternate, and ratios come from pairs.
Peak memory is the maximum resident set minus that after imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bounds import at_least, at_most

WIDTH, LAYERS, HEADS, MLP, VOCABULARY, ROWS, LENGTH = 256, 4, 4, 768, 126_464, 4, 512
CASES = {"11 % masked": 0.11, "46 % masked": 0.46}
# Bounds that the project promises: (speed-up at least, memory ratio at most).
BOUNDS = {"11 % masked": (4.0, 0.40), "46 % masked": (2.0, 0.45)}
VARIANTS = ("ours", "torch", "dense")
PHASES: tuple[str, ...] = ("forward", "head", "backward", "optimizer")


def run(pairs: int = 3, steps: int = 4) -> dict[str, Any]:
    """Measure the variants in turn; return medians, ratios and the counted floor of each phase."""
    from benchmarks.machine import measure

    machine = measure()
    results: dict[str, Any] = {"machine": asdict(machine), "cases": {}}
    for case, masked in CASES.items():
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(pairs):
            for variant, runs in found.items():
                runs.append(_child(variant, masked, steps))
        medians = {
            variant: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for variant, runs in found.items()
        }
        ours = medians["ours"]
        floor = counted_floor(masked, machine.flops, machine.bytes)
        results["cases"][case] = {
            **medians,
            "speedup": statistics.median(
                d["step"] / o["step"] for o, d in zip(found["ours"], found["dense"], strict=True)
            ),
            "memory_ratio": statistics.median(
                o["peak_gib"] / d["peak_gib"] for o, d in zip(found["ours"], found["dense"], strict=True)
            ),
            "floor": floor,
            "over_floor": {name: ours[name] / floor[name] for name in (*PHASES, "step")},
            "bounds": dict(zip(("speedup_at_least", "memory_ratio_at_most"), BOUNDS[case], strict=True)),
        }
    return results


def counted_floor(masked: float, flops: float, rate: float) -> dict[str, float]:
    """Count each phase's least seconds: operations ÷ matmul rate, or bytes ÷ copy rate, never both.

    forward: the blocks' matmuls and attention. head: three matmuls over the scored positions (logits, gradient of the
    hidden states, gradient of the head). backward: twice the blocks' forward, and writing the embedding's gradient.
    optimizer: AdamW reads weight, gradient and two moments and writes weight and moments; the norm reads the gradients.
    """
    tokens = ROWS * LENGTH
    scored = masked * tokens
    matrices = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    blocks = 2 * tokens * matrices + LAYERS * 4 * tokens * LENGTH * WIDTH
    parameters = matrices + 2 * VOCABULARY * WIDTH
    floor = {
        "forward": blocks / flops,
        "head": 3 * 2 * scored * WIDTH * VOCABULARY / flops,
        "backward": 2 * blocks / flops + 4 * VOCABULARY * WIDTH / rate,
        "optimizer": (7 + 1) * 4 * parameters / rate,
    }
    return {**floor, "step": sum(floor.values())}


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    machine = results["machine"]
    lines = [
        f"LLaDA d={WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY:,}, {ROWS} rows × {LENGTH} tokens, fp32; "
        f"{machine['threads']} threads, {machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bytes'] / 1e9:.1f} GB/s",
        f"{'case':<14}{'variant':<9}{'step s':>8}{'peak GiB':>10}   {'  '.join(f'{p:>9}' for p in PHASES)}",
    ]
    for case, found in results["cases"].items():
        for variant in (name for name in reversed(VARIANTS) if name in found):
            values = found[variant]
            phases = "  ".join(f"{values[p]:9.3f}" for p in PHASES) if variant != "dense" else ""
            lines.append(f"{case:<14}{variant:<9}{values['step']:8.3f}{values['peak_gib']:10.2f}   {phases}")
        floor = found["floor"]
        lines.append(
            f"{'':<14}{'floor':<9}{floor['step']:8.3f}{'':>10}   {'  '.join(f'{floor[p]:9.3f}' for p in PHASES)}"
        )
        over = found["over_floor"]
        lines.append(
            f"{'':<14}{'× floor':<9}{over['step']:8.2f}{'':>10}   {'  '.join(f'{over[p]:9.2f}' for p in PHASES)}"
        )
        bounds = found["bounds"]
        lines.append(
            f"{'':<14}speed-up {found['speedup']:.2f} ({at_least(found['speedup'], bounds['speedup_at_least'])}), "
            f"memory {found['memory_ratio']:.2f} ({at_most(found['memory_ratio'], bounds['memory_ratio_at_most'])})"
        )
    return "\n".join(lines)


def _child(variant: str, masked: float, steps: int) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.training_step", variant, str(masked), str(steps)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def peak_resident_gib() -> float:
    """Return the peak resident set in GiB; VmHWM, since a child's ru_maxrss starts at its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("no VmHWM in /proc/self/status; this benchmark runs on Linux")


def _measure(variant: str, masked: float, steps: int) -> dict[str, float]:
    import torch

    from unmask.config.training import OptimizerConfig
    from unmask.distributed.runtime import Runtime
    from unmask.models.llada.config import LLaDAConfig
    from unmask.models.llada.model import LLaDA, initialise
    from unmask.objectives import terms
    from unmask.objectives.mdlm import MDLM
    from unmask.rng import NoiseStream
    from unmask.training.optim import build_optimizer
    from unmask.training.step import train_step

    after_imports = peak_resident_gib()
    config = LLaDAConfig(
        d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, mlp_hidden_size=MLP, vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
    )  # fmt: skip
    model = LLaDA(config)
    initialise(model, torch.Generator().manual_seed(0))
    batch = _batch(masked)
    runtime = Runtime(torch.device("cpu"), None)
    # eps just below 1 makes p ≈ 1: every supervised token is masked, and their share is what the case says.
    objective = MDLM(config.mask_token_id, eps=1 - 1e-6)
    times: list[dict[str, float]] = []
    if variant != "dense":
        if variant == "torch":
            terms.linear_cross_entropy = _torch_loss
        optimizer = build_optimizer(OptimizerConfig(lr=1e-4), model)
        clock = _Clock(model, optimizer)
        for _ in range(steps):
            times.append(
                clock.timed(lambda: train_step(model, objective, [batch], NoiseStream(0), optimizer, runtime, 1.0))
            )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        noisy = objective.corrupt(batch, NoiseStream(0))
        for _ in range(steps):
            start = time.perf_counter()
            _dense_step(model, noisy, optimizer)
            times.append({"step": time.perf_counter() - start})
    counted = times[1:]  # the first step allocates
    medians = {name: statistics.median(one[name] for one in counted) for name in counted[0]}
    return {**medians, "peak_gib": peak_resident_gib() - after_imports}


def _batch(masked: float) -> Any:
    import torch

    from unmask.batch import Batch

    torch.manual_seed(0)
    supervised = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    supervised[:, : round(masked * LENGTH)] = True
    return Batch(
        input_ids_BL=torch.randint(0, VOCABULARY, (ROWS, LENGTH)),
        supervised_BL=supervised,
        attention_mask_BL=torch.ones(ROWS, LENGTH, dtype=torch.bool),
        answer_lengths_B=supervised.sum(1),
        sample_ids_B=torch.arange(ROWS),
        epoch=0,
        slots_B=torch.arange(ROWS),
        global_rows=ROWS,
        cut_B=torch.zeros(ROWS, dtype=torch.bool),
        peers_P=torch.arange(ROWS),
    )


def _dense_step(model: Any, noisy: Any, optimizer: Any) -> None:
    """The textbook step: logits for all positions, cross-entropy everywhere, weights zero where nothing is masked."""
    import torch
    import torch.nn.functional as F

    optimizer.zero_grad()
    logits_BLV = model.logits(model(noisy.noisy_ids_BL))
    losses = F.cross_entropy(logits_BLV.flatten(0, 1), noisy.clean.input_ids_BL.flatten(), reduction="none")
    loss = (losses * noisy.weights_BL.flatten()).sum() / noisy.counts["mdlm"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()


def _torch_loss(hidden_ND: Any, head: Any, targets_N: Any, weights_N: Any) -> tuple[Any, Any]:
    """Return what our `linear_cross_entropy` does, by PyTorch's own."""
    import torch.nn.functional as F
    from torch.nn import LinearCrossEntropyOptions

    from unmask.ops.chunks import CHUNK_LOGITS

    options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK_LOGITS // VOCABULARY, chunking_method=None)
    losses_N = F.linear_cross_entropy(hidden_ND, head.weight, targets_N, reduction="none", options=options)
    return (losses_N * weights_N).sum(), losses_N.detach()


class _Clock:
    """Times the phases of our step from outside, by wrapping the calls where they begin and end."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        from unmask.objectives import terms
        from unmask.training import step

        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wrap(model, "forward", "forward")
        self._wrap(terms, "linear_cross_entropy", "head")
        self._wrap(step, "clip_gradients", "optimizer")
        self._wrap(optimizer, "step", "optimizer")

    def timed(self, action: Any) -> dict[str, float]:
        """Return the seconds of one step by phase; what is no other phase is backward."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        start = time.perf_counter()
        action()
        total = time.perf_counter() - start
        self.seconds["backward"] = total - sum(self.seconds.values())
        return {**self.seconds, "step": total}

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **options)
            self.seconds[phase] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("masked", type=float)
    parser.add_argument("steps", type=int)
    chosen = parser.parse_args()
    print(json.dumps(_measure(chosen.variant, chosen.masked, chosen.steps)))
