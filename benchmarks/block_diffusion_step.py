"""A whole DiffusionGemma training step, ours against transformers' class run the dense way.

The dense way: logits of every encoder and canvas position, the whole response decoded (each canvas seeing the clean
tokens before it), a first pass for self-conditioning in every step, torch's default AdamW and clipping. Ours is run
with both outcomes of the self-conditioning coin, and both its time and its peak are their mean.

One process a variant, because peak memory is a process's own; the variants alternate, and ratios come from pairs. Peak
memory is the maximum resident set minus that after imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.bounds import at_least, at_most
from benchmarks.training_step import peak_resident_gib

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 4, 4, 2, 64, 512
VOCABULARY, EXPERTS, TOP, EXPERT_WIDTH, CANVAS, LENGTH = 262_144, 8, 2, 256, 256, 1024
# Tokens of the response → bounds that the project promises: (speed-up at least, memory ratio at most).
CASES: dict[int, tuple[float, float | None]] = {256: (2.5, 0.40), 768: (3.5, None)}
VARIANTS = ("with self-conditioning", "without", "dense")
RATIOS = {"speedup": "step", "cpu_speedup": "cpu"}


def run(pairs: int = 3, steps: int = 3) -> dict[str, Any]:
    """Measure all variants in turn; return medians, ratios of pairs and the counted floor of a step."""
    from benchmarks.machine import measure

    machine = measure()
    results: dict[str, Any] = {"machine": asdict(machine), "cases": {}}
    for response, bounds in CASES.items():
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(pairs):
            for variant, runs in found.items():
                runs.append(_child(variant, response, steps))
        measured = {
            variant: {name: statistics.median(one[name] for one in runs) for name in runs[0]}
            for variant, runs in found.items()
        }
        pairs_of_both = zip(*(found[variant] for variant in VARIANTS), strict=True)
        mixed = [
            ({name: (coin[name] + none[name]) / 2 for name in dense}, dense) for coin, none, dense in pairs_of_both
        ]
        ours = {name: statistics.median(one[name] for one, _ in mixed) for name in mixed[0][0]}
        floor = counted_floor(machine.flops, machine.bytes)
        results["cases"][f"{response}-token response"] = {
            **measured,
            "ours": ours,
            **{name: statistics.median(dense[key] / one[key] for one, dense in mixed) for name, key in RATIOS.items()},
            "memory_ratio": statistics.median(one["peak_gib"] / dense["peak_gib"] for one, dense in mixed),
            "floor": floor,
            "over_floor": ours["step"] / floor,
            "bounds": dict(zip(("speedup_at_least", "memory_ratio_at_most"), bounds, strict=True)),
        }
    return results


def counted_floor(flops: float, rate: float) -> float:
    """Count the least seconds of our step, half of the time with a first pass: operations and bytes over their rates.

    Head: three matmuls over the encoder's next-token pairs and the canvas, and with a first pass one for its logits and
    one for the signal. Layers: forward and twice that backward over clean tokens and canvas. AdamW, norm and the
    embedding's gradient by bytes.
    """
    full_kv = KV_HEADS * HEAD_DIM
    matrices = LAYERS * (
        WIDTH * HEAD_DIM * HEADS * 2 + 2 * WIDTH * full_kv + 3 * WIDTH * MLP + 3 * TOP * WIDTH * EXPERT_WIDTH
    )
    head = 2 * WIDTH * VOCABULARY
    operations = 3 * head * (LENGTH + CANVAS) + 0.5 * 2 * head * CANVAS
    operations += 3 * 2 * matrices * (LENGTH + CANVAS) + 0.5 * 2 * matrices * CANVAS
    parameters = matrices + LAYERS * 3 * (EXPERTS - TOP) * WIDTH * EXPERT_WIDTH + VOCABULARY * WIDTH
    return operations / flops + ((7 + 1) * 4 * parameters + 4 * VOCABULARY * WIDTH) / rate


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    machine = results["machine"]
    lines = [
        f"DiffusionGemma d={WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY:,}, {EXPERTS} experts top-{TOP}, "
        f"canvas {CANVAS}, 1 × {LENGTH} tokens, fp32; {machine['threads']} threads, "
        f"{machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bytes'] / 1e9:.1f} GB/s",
        f"{'case':<22}{'variant':<24}{'step s':>8}{'peak GiB':>10}",
    ]
    for case, found in results["cases"].items():
        for variant in ("dense", *VARIANTS[:2], "ours"):
            lines.append(f"{case:<22}{variant:<24}{found[variant]['step']:8.3f}{found[variant]['peak_gib']:10.2f}")
        bounds = found["bounds"]
        limit = bounds["memory_ratio_at_most"]
        memory = "" if limit is None else f" ({at_most(found['memory_ratio'], limit)})"
        lines.append(
            f"{'':<22}speed-up {found['speedup']:.2f} ({at_least(found['speedup'], bounds['speedup_at_least'])}; of "
            f"processor time {found['cpu_speedup']:.2f}), memory {found['memory_ratio']:.2f}{memory}, "
            f"× floor {found['over_floor']:.2f}"
        )
    return "\n".join(lines)


def _child(variant: str, response: int, steps: int) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.block_diffusion_step", variant, str(response), str(steps)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def _measure(variant: str, response: int, steps: int) -> dict[str, float]:
    import torch
    import transformers.models.diffusion_gemma.modeling_diffusion_gemma  # noqa: F401  (both variants pay for imports)

    torch.manual_seed(0)
    action = _dense(response) if variant == "dense" else _ours(variant == VARIANTS[0], response)
    before, model_and_step = action
    step = model_and_step()
    times, cpu_times = [], []
    for _ in range(steps):
        start, cpu = time.perf_counter(), time.process_time()
        step()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu)
    # The first step allocates.
    return {
        "step": statistics.median(times[1:]), "cpu": statistics.median(cpu_times[1:]),
        "peak_gib": peak_resident_gib() - before,
    }  # fmt: skip


def _text_config() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "global_head_dim": HEAD_DIM, "num_global_key_value_heads": KV_HEADS, "sliding_window": 2 * LENGTH,
        "num_experts": EXPERTS, "top_k_experts": TOP, "moe_intermediate_size": EXPERT_WIDTH,
    }  # fmt: skip


def _ours(conditioned: bool, response: int) -> tuple[float, Any]:
    import torch

    from unmask.batch import Batch
    from unmask.config.training import OptimizerConfig
    from unmask.distributed.runtime import Runtime
    from unmask.models.diffusion_gemma.family import parse_config
    from unmask.models.diffusion_gemma.model import DiffusionGemma, initialise
    from unmask.objectives.canvas import CanvasDiffusion
    from unmask.rng import NoiseStream
    from unmask.training.optim import build_optimizer
    from unmask.training.step import train_step

    before = peak_resident_gib()

    def build() -> Any:
        config = parse_config({"text_config": _text_config(), "canvas_length": CANVAS}, "benchmark")
        model = DiffusionGemma(config)
        initialise(model, torch.Generator().manual_seed(0))
        supervised_BL = (torch.arange(LENGTH) >= LENGTH - response)[None]
        batch = Batch(
            input_ids_BL=torch.randint(0, VOCABULARY, (1, LENGTH)),
            supervised_BL=supervised_BL,
            attention_mask_BL=torch.ones(1, LENGTH, dtype=torch.bool),
            answer_lengths_B=supervised_BL.sum(1),
            sample_ids_B=torch.zeros(1, dtype=torch.long),
            epoch=0,
            slots_B=torch.zeros(1, dtype=torch.long),
            global_rows=1,
            cut_B=torch.zeros(1, dtype=torch.bool),
            peers_P=torch.zeros(1, dtype=torch.long),
        )
        objective = CanvasDiffusion(CANVAS, VOCABULARY, 1, self_conditioning_p=float(conditioned))
        optimizer = build_optimizer(OptimizerConfig(lr=1e-4), model)
        runtime = Runtime(torch.device("cpu"), None)
        return lambda: train_step(model, objective, [batch], NoiseStream(0), optimizer, runtime, 1.0)

    return before, build


def _dense(response: int) -> tuple[float, Any]:
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    vision = {
        "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64,
    }  # fmt: skip
    before = peak_resident_gib()

    def build() -> Any:
        config = DiffusionGemmaConfig(text_config=_text_config(), vision_config=vision, canvas_length=CANVAS)
        config._attn_implementation = "sdpa"
        model = DiffusionGemmaForBlockDiffusion(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids, start = torch.randint(0, VOCABULARY, (1, LENGTH)), LENGTH - response
        canvas = torch.randint(0, VOCABULARY, (1, response))
        block = torch.arange(response) // CANVAS
        clean = torch.arange(LENGTH)[None] < start + block[:, None] * CANVAS
        mask = torch.cat((clean, block[:, None] == block[None]), dim=1)[None, None]
        masks = {"full_attention": mask, "sliding_attention": mask}
        positions = torch.arange(start, LENGTH)[None]
        return lambda: _dense_step(model, optimizer, ids, canvas, masks, positions)

    return before, build


def _dense_step(model: Any, optimizer: Any, ids: Any, canvas: Any, masks: Any, positions: Any) -> None:
    import torch
    import torch.nn.functional as F

    optimizer.zero_grad()
    encoded = model.model.encoder(input_ids=ids)
    given = {
        "past_key_values": encoded.past_key_values, "decoder_input_ids": canvas,
        "decoder_attention_mask": masks, "decoder_position_ids": positions,
    }  # fmt: skip
    with torch.no_grad():
        first = model(**given).logits
    logits = model(**given, self_conditioning_logits=first).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[0, -canvas.shape[1] :])
    cap = model.final_logit_softcapping
    ahead = torch.tanh(model.lm_head(encoded.last_hidden_state).float() / cap) * cap
    loss = loss + F.cross_entropy(ahead[0, :-1], ids[0, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("response", type=int)
    parser.add_argument("steps", type=int)
    chosen = parser.parse_args()
    print(json.dumps(_measure(chosen.variant, chosen.response, chosen.steps)))
