"""What DiffusionGemma's settings cost and save: a network trained here solves held-out problems by each of them.

The problems are the quickstart's, the network a small DiffusionGemma trained from scratch with the project's own
objective. An answer is right when its whole text is; it fits one canvas. Sampling is random, so each setting answers
all test problems with several seeds. The presets were chosen by this table.

Network calls say what a setting saves of a large network, too; the tokens a second are this small one's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.trained_sampling import share_right, train_on_problems

CANVAS, STEPS, SEEDS, AT_ONCE = 24, 1400, 8, 16
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32, "sliding_window": 128, "num_experts": 4,
    "top_k_experts": 2, "moe_intermediate_size": 64, "max_position_embeddings": 256,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
RELEASED: dict[str, Any] = {"steps": 48, "entropy_bound": 0.1, "confidence_threshold": 0.005, "stability_threshold": 1}
# One setting changed at a time, then the presets, of which `reference` is the released settings.
CHANGES: tuple[dict[str, Any], ...] = (
    *({"steps": steps} for steps in (32, 24, 16, 8, 4)),
    *({"entropy_bound": bound} for bound in (0.02, 0.5, 2.0)),
    *({"confidence_threshold": threshold} for threshold in (0.01, 0.02, 0.05, 0.2)),
    *({"stability_threshold": 0, "confidence_threshold": threshold} for threshold in (0.005, 0.02, 0.2)),
    {"steps": 16, "confidence_threshold": 0.05},
)
PRESETS = ("balanced", "fast")


def configuration(root: Path, seed: int) -> dict[str, Any]:
    """Return the run's configuration."""
    from unmask.distributed.runtime import fast_bf16
    from unmask.quickstart import RUN, TOKENIZER, VALIDATION_ROWS

    data = {"tokenizer": str(root / TOKENIZER), "seq_length": 80, "unshifted": True}
    # <eos> and <turn|>, by the family's `control_tokens`.
    text = {**TEXT, "vocab_size": 384, "eos_token_id": 1}
    config = {
        "model_type": "diffusion_gemma", "canvas_length": CANVAS, "eos_token_id": [1, 4], "text_config": text,
    }  # fmt: skip
    return {
        "model": {"config": config},
        # Answers are short and half of each is copied: a high least level spends the minutes on what is hard. Nothing
        # is there yet for a frozen router to keep.
        "dllm": {"mode": "block_diffusion", "eps": 0.6, "time_sampling": "stratified", "freeze_router": False},
        "dataset": {"path_or_dataset_id": str(root / "train.jsonl"), **data},
        "validation_dataset": {"path_or_dataset_id": str(root / "validation.jsonl"), **data},
        "validation": {
            "generate_every_steps": STEPS // 4, "max_samples": VALIDATION_ROWS, "batch_size": VALIDATION_ROWS,
            "sampler": {"max_new_tokens": CANVAS},
        },
        "step_scheduler": {
            "global_batch_size": 64, "local_batch_size": 64, "max_steps": STEPS, "val_every_steps": STEPS // 4,
        },
        "optimizer": {"lr": 3e-3, "betas": [0.9, 0.99], "weight_decay": 0.01},
        "lr_scheduler": {"lr_decay_style": "cosine", "lr_warmup_steps": 50},
        "distributed": {"autocast_dtype": "bfloat16" if fast_bf16() else "float32", "device": "cpu"},
        "checkpoint": {"checkpoint_dir": str(root / RUN)},
        "seed": seed,
    }  # fmt: skip


def run() -> dict[str, Any]:
    """Train, then measure exact match, network calls and speed of every setting."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        values = configuration(root, seed=42)
        model, tokenizer, test, seconds = train_on_problems(root, values)
    return measured(model, tokenizer, test) | {"training_seconds": seconds}


def measured(model: Any, tokenizer: Any, test: Sequence[Any]) -> dict[str, Any]:
    """Return what every setting gives with a trained network: means over seeds, of tokens a second the median."""
    settings = {"released": {"preset": "reference", **RELEASED}}
    settings |= {_name(change): {**RELEASED, **change} for change in CHANGES}
    settings |= {f"preset {name}": {"preset": name} for name in PRESETS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for seed in range(SEEDS):
        for name, values in settings.items():
            runs[name].append(_solve(model, tokenizer, test, values, seed))
    found = {
        name: {
            "exact_match": statistics.mean(one["exact_match"] for one in of_seeds),
            "exact_match_by_seed": [one["exact_match"] for one in of_seeds],
            "calls": statistics.mean(one["calls"] for one in of_seeds),
            "tokens_per_call": statistics.mean(one["tokens_per_call"] for one in of_seeds),
            "tokens_per_second": statistics.median(one["tokens_per_second"] for one in of_seeds),
        }
        for name, of_seeds in runs.items()
    }
    return {
        "sizes": {"canvas": CANVAS, "steps": STEPS, **{key: TEXT[key] for key in ("hidden_size", "num_hidden_layers")}},
        "test_problems": len(test), "seeds": SEEDS, "settings": found,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    sizes = results["sizes"]
    lines = [
        f"DiffusionGemma d={sizes['hidden_size']}, {sizes['num_hidden_layers']} layers, trained "
        f"{results['training_seconds']:.0f} s ({sizes['steps']:,} steps) on the quickstart's problems; canvas "
        f"{sizes['canvas']}; whole answers to {results['test_problems']} held-out problems, {results['seeds']} seeds",
        f"{'settings':<52}{'exact match':>12}{'lowest':>8}{'highest':>8}{'calls':>8}{'tokens/call':>12}"
        f"{'tokens/s':>10}",
    ]
    for name, found in results["settings"].items():
        by_seed = found["exact_match_by_seed"]
        lines.append(
            f"{name:<52}{found['exact_match']:>12.1%}{min(by_seed):>8.1%}{max(by_seed):>8.1%}{found['calls']:>8.2f}"
            f"{found['tokens_per_call']:>12.2f}{found['tokens_per_second']:>10.0f}"
        )
    return "\n".join(lines)


def _name(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in change.items())


def _solve(model: Any, tokenizer: Any, test: Sequence[Any], settings: dict[str, Any], seed: int) -> dict[str, float]:
    from unmask.config.sampler import SamplerConfig
    from unmask.sampling.generate import generate

    sampler = SamplerConfig(**{"max_new_tokens": CANVAS, **settings})
    questions = [problem.question for problem in test]
    began = time.perf_counter()
    answers = generate(model, questions, tokenizer=tokenizer, sampler=sampler, batch_size=AT_ONCE, seed=seed)
    seconds = time.perf_counter() - began
    tokens, calls = sum(len(answer.token_ids) for answer in answers), sum(answer.stats.nfe for answer in answers)
    return {
        "exact_match": share_right([answer.text or "" for answer in answers], test),
        "calls": calls / len(answers), "tokens_per_call": tokens / calls, "tokens_per_second": tokens / seconds,
    }  # fmt: skip
