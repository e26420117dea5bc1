"""Evaluation: rows in batches against rows one at a time, and what complementary masks save a likelihood estimate.

Exact match through the sampling engine, with the preset `fast` and by full forwards, and the Monte Carlo bound, on
GSM8K questions, with a random LLaDA of 10 M parameters in the dtype that this machine is faster with, on a CUDA device
where there is one. The two variants alternate in one process, on the same rows; ratios come from pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bounds import at_least

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
ROWS, STEPS, LENGTH, MASKS, BATCH = 16, 8, 32, 8, 16
# Batched against one at a time, the project promises, with the preset for evaluating. On a CPU a full forward of one
# row of 200 tokens fills the cores already, and batching it saves overhead alone.
AT_LEAST = {"exact match, fast": 3.0}
SEEDS = 12


def run(pairs: int = 3) -> dict[str, Any]:
    """Measure both batch sizes in alternating pairs; return seconds, ratios, and the errors of the two estimates."""
    import numpy as np

    from benchmarks.machine import measure
    from unmask.config.sampler import SamplerConfig
    from unmask.evaluation.exact_match import encode_questions, score_answers
    from unmask.evaluation.likelihood import log_likelihoods
    from unmask.evaluation.tasks import read_questions
    from unmask.models.tokenizer import load_tokenizer

    machine = measure()
    model, tokenizer = _model(), load_tokenizer(str(FIXTURES / "mdlm_step"))
    questions = read_questions(FIXTURES / "gsm8k_chat_64.jsonl", ROWS)
    exact = SamplerConfig(steps=STEPS, max_new_tokens=LENGTH, eos="suppress")
    fast = SamplerConfig(preset="fast", max_new_tokens=LENGTH, eos="suppress")
    asked = encode_questions(questions, tokenizer, model.config)
    scored = [
        (ids, tokenizer.encode(question.reference, add_special_tokens=False)[:LENGTH])
        for ids, question in zip(asked, questions, strict=True)
    ]
    work: dict[str, Callable[[int], Any]] = {
        "exact match, fast": lambda size: score_answers(
            model, questions, tokenizer=tokenizer, sampler=fast, batch_size=size
        ),
        "exact match": lambda size: score_answers(
            model, questions, tokenizer=tokenizer, sampler=exact, batch_size=size
        ),
        "likelihood": lambda size: log_likelihoods(model, scored, MASKS, batch_size=size),
    }
    results: dict[str, Any] = {"machine": asdict(machine), "parameters": _parameters(model), "tasks": {}}
    weight = next(model.parameters())
    results |= {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}
    for name, task in work.items():
        seconds: dict[int, list[float]] = {BATCH: [], 1: []}
        for _ in range(pairs):
            for size, times in seconds.items():
                times.append(_seconds(task, size))
        ratios = [one / many for many, one in zip(seconds[BATCH], seconds[1], strict=True)]
        results["tasks"][name] = {
            "batched_seconds": statistics.median(seconds[BATCH]),
            "single_seconds": statistics.median(seconds[1]),
            "speedup": statistics.median(ratios),
            "speedups": ratios,
        }
    results["errors"] = {
        kind: float(np.std([_estimate(model, scored[:2], seed, kind == "pairs") for seed in range(SEEDS)], ddof=1))
        for kind in ("independent", "pairs")
    }
    return results


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    machine = results["machine"]
    lines = [
        f"LLaDA of {results['parameters'] / 1e6:.1f} M parameters, {results['dtype']}, {results['device']}; {ROWS} "
        f"GSM8K questions, {LENGTH} tokens, full forwards in {STEPS} steps, {MASKS} masks; {machine['threads']} "
        f"threads, {machine['flops'] / 1e9:.0f} GFLOP/s"
    ]
    for name, found in results["tasks"].items():
        bound = f" ({at_least(found['speedup'], AT_LEAST[name])})" if name in AT_LEAST else ""
        lines.append(
            f"{name:<18}batches of {BATCH}: {found['batched_seconds']:6.1f} s, of 1: {found['single_seconds']:6.1f} s, "
            f"{found['speedup']:.2f} times as fast{bound}"
        )
    errors = results["errors"]
    lines.append(
        f"likelihood of two answers, {MASKS} masks each, deviation over {SEEDS} seeds: "
        f"{errors['independent']:.3f} nats independent, {errors['pairs']:.3f} in pairs"
    )
    return "\n".join(lines)


def _model() -> Any:
    from unmask.config.model import ModelConfig
    from unmask.distributed.runtime import fast_bf16, pick_device
    from unmask.models.folders import read_json
    from unmask.models.loading import build_model
    from unmask.models.registry import plan_model

    ids = read_json(FIXTURES / "mdlm_step" / "config.json")  # its tokenizer has 4096 ids
    names = ("vocab_size", "embedding_size", "mask_token_id", "eos_token_id", "pad_token_id")
    values = {
        "model_type": "llada", "d_model": 320, "n_heads": 5, "n_layers": 7, "mlp_hidden_size": 800,
        "max_sequence_length": 1024, **{name: ids[name] for name in names},
    }  # fmt: skip
    device = pick_device("auto")
    model = build_model(plan_model(ModelConfig(config=values)), None, device).eval()
    return model.bfloat16() if device.type == "cuda" or fast_bf16() else model


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _seconds(task: Callable[[int], Any], size: int) -> float:
    began = time.perf_counter()
    task(size)
    return time.perf_counter() - began


def _estimate(model: Any, scored: Any, seed: int, antithetic: bool) -> float:
    from unmask.evaluation.likelihood import log_likelihoods

    return sum(float(found) for found in log_likelihoods(model, scored, MASKS, seed, antithetic=antithetic))
