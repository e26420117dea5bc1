"""Peak memory of a DiffusionGemma training step with LoRA on experts, beside LoRA on attention alone.

One process a variant, because peak memory is a process's own. Peak memory is the maximum resident set minus that after
imports. In the second case the layers' activations take more memory than the embedding and the logits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from typing import Any

from benchmarks.training_step import peak_resident_gib

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 4, 4, 2, 64, 512
EXPERTS, TOP, EXPERT_WIDTH, CANVAS, LENGTH, RESPONSE, RANK = 8, 2, 256, 256, 1024, 256, 16
CASES = ((262_144, 1), (4_096, 4))  # (vocabulary, rows)
ATTENTION = ["*.self_attn.*"]
# Variant → its `peft` section.
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "attention and experts": {"target_modules": ATTENTION, "target_parameters": ["*.experts.*"]},
    "experts": {"target_modules": [], "target_parameters": ["*.experts.*"]},
}
BOUND = 1.3  # of LoRA on attention, the project promises


def run(steps: int = 2) -> dict[str, Any]:
    """Measure all variants; return peaks and their ratios to LoRA on attention alone."""
    results: dict[str, Any] = {"bound": BOUND, "cases": {}}
    for vocabulary, rows in CASES:
        measured = {variant: _child(variant, vocabulary, rows, steps) for variant in VARIANTS}
        least = measured["attention"]["peak_gib"]
        ratios = {variant: one["peak_gib"] / least for variant, one in measured.items()}
        results["cases"][f"vocabulary {vocabulary:,}, rows {rows}"] = {"measured": measured, "ratios": ratios}
    return results


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    lines = [
        f"DiffusionGemma d={WIDTH}, {LAYERS} layers, {EXPERTS} experts top-{TOP}, {LENGTH} tokens a row, canvas "
        f"{CANVAS}, rank {RANK}, fp32",
        f"{'case':<28}{'LoRA on':<24}{'peak GiB':>10}{'ratio':>8}   (bound ≤ {results['bound']})",
    ]
    for case, found in results["cases"].items():
        for variant, values in found["measured"].items():
            ratio = found["ratios"][variant]
            missed = "" if ratio <= results["bound"] else "   MISSED"
            lines.append(f"{case:<28}{variant:<24}{values['peak_gib']:10.3f}{ratio:8.2f}{missed}")
    return "\n".join(lines)


def _child(variant: str, vocabulary: int, rows: int, steps: int) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.lora_experts", variant, str(vocabulary), str(rows), str(steps)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def _measure(variant: str, vocabulary: int, rows: int, steps: int) -> dict[str, float]:
    import torch

    import unmask.models.lora  # noqa: F401  (before PEFT, which else warns of bitsandbytes's kernels)
    from unmask.config.model import PeftConfig
    from unmask.config.training import OptimizerConfig
    from unmask.distributed.runtime import Runtime
    from unmask.models.diffusion_gemma.family import parse_config
    from unmask.models.diffusion_gemma.model import DiffusionGemma, initialise
    from unmask.objectives.canvas import CanvasDiffusion
    from unmask.rng import NoiseStream
    from unmask.training.lora import attach
    from unmask.training.optim import build_optimizer
    from unmask.training.step import train_step

    importlib.import_module("peft")  # `attach` loads it, and it is not what is measured
    after_imports = peak_resident_gib()
    torch.manual_seed(0)
    text = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_experts": EXPERTS,
        "top_k_experts": TOP, "moe_intermediate_size": EXPERT_WIDTH, "max_position_embeddings": 2 * LENGTH,
        "global_head_dim": HEAD_DIM, "num_global_key_value_heads": KV_HEADS,
    }  # fmt: skip
    config = parse_config({"text_config": text, "canvas_length": CANVAS}, "the benchmark")
    model = DiffusionGemma(config)
    initialise(model, torch.Generator().manual_seed(0))
    attach(model, PeftConfig(r=RANK, **VARIANTS[variant]), "")
    optimizer = build_optimizer(OptimizerConfig(lr=1e-4), model)
    objective = CanvasDiffusion(CANVAS, vocabulary, config.eos_token_id, self_conditioning_p=1.0)
    batch, runtime = _batch(vocabulary, rows), Runtime(torch.device("cpu"), None)
    for _ in range(steps):
        train_step(model.train(), objective, [batch], NoiseStream(0), optimizer, runtime, 1.0)
    return {"peak_gib": peak_resident_gib() - after_imports}


def _batch(vocabulary: int, rows: int) -> Any:
    import torch

    from unmask.batch import Batch

    supervised = torch.zeros(rows, LENGTH, dtype=torch.bool)
    supervised[:, LENGTH - RESPONSE :] = True
    return Batch(
        input_ids_BL=torch.randint(2, vocabulary, (rows, LENGTH)),
        supervised_BL=supervised,
        attention_mask_BL=torch.ones(rows, LENGTH, dtype=torch.bool),
        answer_lengths_B=supervised.sum(1),
        sample_ids_B=torch.arange(rows),
        epoch=0,
        slots_B=torch.arange(rows),
        global_rows=rows,
        cut_B=torch.zeros(rows, dtype=torch.bool),
        peers_P=torch.arange(rows),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=tuple(VARIANTS))
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("rows", type=int)
    parser.add_argument("steps", type=int)
    chosen = parser.parse_args()
    print(json.dumps(_measure(chosen.variant, chosen.vocabulary, chosen.rows, chosen.steps)))
