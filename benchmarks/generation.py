"""DiffusionGemma's sampler, ours against transformers' `generate`: tokens a second on the same random weights, in fp32.

Both sides have the same prompts and settings. Their draws differ, since transformers' come from one generator for the
whole batch; so do the steps at which rows stop, and the mean network calls of a row are shown beside the rates.

One process a variant; the variants alternate, and ratios come from pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.bounds import at_least

WIDTH, LAYERS, VOCABULARY, EXPERTS, TOP_K, PROMPT = 256, 4, 262_144, 8, 2, 64
# The factor on random embeddings at which entropies lie between a nat and three, as in the middle of real denoising.
SHARPNESS = 13.0


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        rows: prompts, denoised together.
        canvas: tokens of a canvas.
        max_new_tokens: longest answer.
        steps: network calls of a canvas.
        ends: token ids, of the whole vocabulary, that end an answer, so that rows end in different canvases.
        speedup_at_least: the bound that the project promises.
    """

    rows: int
    canvas: int
    max_new_tokens: int
    steps: int
    ends: int
    speedup_at_least: float


# In the batch a canvas is 64 and not 256: transformers' logits of 8 × 256 positions need 17 GB.
CASES = {
    "1 row": Case(1, 256, 256, 4, 0, 1.2),
    "8 rows that end at different times": Case(8, 64, 256, 3, 1500, 2.0),
}


def run(pairs: int = 3) -> dict[str, Any]:
    """Measure both variants in alternating pairs; return medians, ratios and the counted floor."""
    from benchmarks.machine import measure

    machine = measure()
    results: dict[str, Any] = {"machine": asdict(machine), "cases": {}}
    for name, case in CASES.items():
        found: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        for pair in range(pairs):
            for variant, runs in found.items():
                runs.append(_child(variant, name, pair))
        medians = {
            variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for variant, runs in found.items()
        }
        ratios = [
            ours["tokens_per_second"] / theirs["tokens_per_second"]
            for ours, theirs in zip(found["ours"], found["transformers"], strict=True)
        ]
        floor = head_floor(medians["ours"]["positions"], machine.flops)
        results["cases"][name] = {
            **medians,
            "setting": asdict(case),
            "speedup": statistics.median(ratios),
            "speedups": ratios,
            # Of processor time, which a busy machine changes less than the clock's.
            "cpu_speedup": medians["ours"]["tokens_per_cpu_second"] / medians["transformers"]["tokens_per_cpu_second"],
            "floor_seconds": floor,
            "over_floor": medians["ours"]["seconds"] / floor,
        }
    return results


def head_floor(positions: float, flops: float) -> float:
    """Count the least seconds of the two matmuls with the vocabulary, logits and soft embedding, at the matmul rate.

    Args:
        positions: canvas positions times the network calls they were part of.
        flops: operations a second; a multiply-add counts as two.
    """
    return 2 * 2 * positions * WIDTH * VOCABULARY / flops


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    machine = results["machine"]
    lines = [
        f"DiffusionGemma d={WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY:,}, {EXPERTS} experts top-{TOP_K}, fp32; "
        f"{machine['threads']} threads, {machine['flops'] / 1e9:.0f} GFLOP/s"
    ]
    for name, found in results["cases"].items():
        for variant in ("transformers", "ours"):
            values = found[variant]
            lines.append(
                f"{name:<36}{variant:<14}{values['tokens_per_second']:8.1f} tokens/s{values['seconds']:8.1f} s  "
                f"{values['calls_per_row']:5.1f} calls a row"
            )
        lines.append(
            f"{'':<36}speed-up {found['speedup']:.2f} "
            f"({at_least(found['speedup'], found['setting']['speedup_at_least'])}; of processor time "
            f"{found['cpu_speedup']:.2f}), ours {found['over_floor']:.2f} × the floor of {found['floor_seconds']:.1f} s"
        )
    return "\n".join(lines)


def _child(variant: str, case: str, seed: int) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.generation", variant, case, str(seed)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _config_json(case: Case) -> dict[str, Any]:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_global_key_value_heads": 1, "global_head_dim": 128,
        "sliding_window": 512, "num_experts": EXPERTS, "top_k_experts": TOP_K, "moe_intermediate_size": 128,
        "max_position_embeddings": 4096, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return {"model_type": "diffusion_gemma", "text_config": text, "canvas_length": case.canvas, "eos_token_id": [1]}


def _measure(variant: str, case: Case, seed: int) -> dict[str, float]:
    import torch

    from unmask.models.diffusion_gemma.family import parse_config
    from unmask.models.diffusion_gemma.model import DiffusionGemma, initialise

    numbers = torch.Generator().manual_seed(seed)
    model = DiffusionGemma(parse_config(_config_json(case), "config.json"))
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.stack.embed_tokens.weight.mul_(SHARPNESS)
    prompts = torch.randint(2, VOCABULARY, (case.rows, PROMPT), generator=numbers)
    ends = (torch.randperm(VOCABULARY - 2, generator=numbers)[: case.ends] + 2).tolist() or [1]
    generate = _ours if variant == "ours" else _transformers
    return generate(model.eval(), prompts, ends, case, seed)


def _ours(model: Any, prompts: Any, ends: list[int], case: Case, seed: int) -> dict[str, float]:
    from unmask.config.sampler import SamplerConfig
    from unmask.sampling.generate import generate

    model.generation = {"eos_token_id": ends}
    generate(model, prompts[:1], sampler=SamplerConfig(steps=1, max_new_tokens=case.canvas))  # allocates and compiles
    sampler = SamplerConfig(steps=case.steps, max_new_tokens=case.max_new_tokens)
    start, cpu = time.perf_counter(), time.process_time()
    answers = generate(model, prompts, sampler=sampler, seed=seed)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    calls = sum(answer.stats.nfe for answer in answers)
    return _rates(sum(len(answer.token_ids) for answer in answers), calls, seconds, cpu, case)


def _transformers(model: Any, prompts: Any, ends: list[int], case: Case, seed: int) -> dict[str, float]:
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64,
    }  # fmt: skip
    values = {key: value for key, value in _config_json(case).items() if key != "model_type"}
    reference = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**values, vision_config=vision)).eval()
    unexpected = reference.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    assert not unexpected, unexpected
    options = {
        "sampler_config": EntropyBoundSamplerConfig(entropy_bound=0.1), "t_min": 0.4, "t_max": 0.8,
        "stability_threshold": 1, "confidence_threshold": 0.005, "eos_token_id": ends, "pad_token_id": 0,
    }  # fmt: skip
    reference.generate(prompts[:1], max_new_tokens=case.canvas, max_denoising_steps=1, **options)
    torch.manual_seed(seed)
    start, cpu = time.perf_counter(), time.process_time()
    out: Any = reference.generate(
        prompts, max_new_tokens=case.max_new_tokens, max_denoising_steps=case.steps, **options
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    answers = out.sequences[:, PROMPT:]
    is_end = torch.isin(answers, torch.tensor(ends))
    tokens = int((is_end.cumsum(dim=1) == 0).sum())
    # Its own count: calls of a row until it ended, not those that it was dragged along in.
    calls = int(((answers != 0).sum(dim=1) / out.tokens_per_forward).round().sum())
    return _rates(tokens, calls, seconds, cpu, case)


def _rates(tokens: int, calls: int, seconds: float, cpu: float, case: Case) -> dict[str, float]:
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "seconds": seconds,
        "calls_per_row": calls / case.rows,
        "positions": float(calls * case.canvas),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=("ours", "transformers"))
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("seed", type=int)
    chosen = parser.parse_args()
    print(json.dumps(_measure(chosen.variant, CASES[chosen.case], chosen.seed)))
