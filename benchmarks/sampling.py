"""LLaDA's sampler against the algorithm as published: tokens a second, network calls, tokens a call, in one process.

Three parts. Speed: one random network of a real vocabulary, one prompt; random weights are sure of nothing, so a
threshold commits one token a call there, and what it saves shows in the third part. Batch: prompts of unequal length
together and one at a time. Trained: `trained_sampling`, speed beside exact match.

Both sides compute in the dtype that this machine is faster with. Variants alternate, and ratios come from rounds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

from benchmarks import trained_sampling
from benchmarks.bounds import at_least

LAYERS, WIDTH, HEADS, MLP, VOCABULARY = 12, 512, 8, 1536, 126_464
PROMPT, NEW, BLOCK = 256, 128, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"steps": NEW},
    "prefix": {"steps": NEW, "cache": "prefix"},
    "dual": {"steps": NEW, "cache": "dual"},
    "preset balanced": {"preset": "balanced"},
    "preset fast": {"preset": "fast"},
}
# Speed over the published algorithm that the project promises; the preset `reference` is `exact`.
BOUNDS = {"exact": 2.0, "dual": 6.0}
BATCH, BATCH_NEW = 16, 32
# With every variant of the batch part the sampler commits one token a call.
BATCH_CASES: dict[str, dict[str, Any]] = {"dual": {"cache": "dual"}, "exact": {}}


def run(rounds: int = 2) -> dict[str, Any]:
    """Measure all three parts; return medians, ratios and the counted floor of a call."""
    import torch

    from benchmarks.machine import measure
    from unmask.distributed.runtime import fast_bf16

    dtype = torch.bfloat16 if fast_bf16() else torch.float32
    machine = measure(dtype=dtype)
    model = random_network(dtype)
    return {
        "machine": asdict(machine) | {"dtype": str(dtype).removeprefix("torch.")},
        "speed": speed(model, rounds, machine.flops, machine.bytes),
        "batch": {name: batch(model, settings, rounds) for name, settings in BATCH_CASES.items()},
        "trained": trained_sampling.run(),
    }


def random_network(dtype: Any) -> Any:
    """Return the network that is timed."""
    import torch

    from unmask.models.llada.config import LLaDAConfig
    from unmask.models.llada.model import LLaDA, initialise

    config = LLaDAConfig(
        d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, mlp_hidden_size=MLP, vocab_size=VOCABULARY,
        max_sequence_length=PROMPT + NEW,
    )  # fmt: skip
    model = LLaDA(config)
    initialise(model, torch.Generator().manual_seed(0))
    return model.to(dtype).eval()


def speed(model: Any, rounds: int, flops: float, rate: float) -> dict[str, Any]:
    """Time the published algorithm and every variant on one prompt, in alternating rounds."""
    prompt = prompts([PROMPT])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("published", *VARIANTS)}
    _ours(model, prompt, {"steps": 1, "max_new_tokens": 1})  # allocates
    for _ in range(rounds):
        runs["published"].append(_published(model, prompt[0]))
        for name, settings in VARIANTS.items():
            runs[name].append(_ours(model, prompt, settings | {"max_new_tokens": NEW}))
    found: dict[str, Any] = {}
    for name, measured in runs.items():
        found[name] = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for key in ("seconds", "cpu_seconds"):
            ratios = [plain[key] / ours[key] for ours, plain in zip(measured, runs["published"], strict=True)]
            found[name]["speedup" if key == "seconds" else "cpu_speedup"] = statistics.median(ratios)
        found[name]["bound"] = BOUNDS.get(name)
    element = model.transformer.wte.weight.element_size()
    for name, window in (("exact", PROMPT + NEW), ("dual", BLOCK)):
        floor = call_floor(window, element, flops, rate)
        found[name] |= {"call_floor": floor, "over_floor": found[name]["seconds"] / found[name]["calls"] / floor}
    return found


def call_floor(window: int, element: int, flops: float, rate: float) -> float:
    """Count the least seconds of a call that computes `window` positions and has half a block left to score.

    Operations of the matmuls ÷ matmul rate, or bytes of the weights ÷ copy rate, whichever is more.

    Args:
        window: positions that the layers compute.
        element: bytes of a number.
        flops, rate: of this machine.
    """
    weights, head = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP), VOCABULARY * WIDTH
    attention = LAYERS * 4 * window * (PROMPT + NEW) * WIDTH
    operations = 2 * window * weights + attention + 2 * head * (BLOCK + 1) / 2
    return max(operations / flops, element * (weights + head) / rate)


def batch(model: Any, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time prompts of unequal length one at a time and all together, in alternating rounds."""
    unequal = prompts([PROMPT * (row + 1) // BATCH for row in range(BATCH)])
    settings = settings | {"max_new_tokens": BATCH_NEW, "steps": BATCH_NEW}
    pairs = [(_ours(model, unequal, settings, 1), _ours(model, unequal, settings, BATCH)) for _ in range(rounds)]
    alone, together = (
        {key: statistics.median(one[key] for one in runs) for key in runs[0]} for runs in zip(*pairs, strict=True)
    )
    ratios = {
        name: statistics.median(single[key] / joint[key] for single, joint in pairs)
        for name, key in (("speedup", "seconds"), ("cpu_speedup", "cpu_seconds"))
    }
    return {"alone": alone, "together": together, **ratios}


def prompts(lengths: list[int]) -> list[list[int]]:
    """Return random prompts of these lengths."""
    import torch

    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY - 1000, (length,), generator=numbers).tolist() for length in lengths]


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    machine = results["machine"]
    lines = [
        f"LLaDA d={WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY:,}, prompt {PROMPT}, {NEW} new tokens, block "
        f"{BLOCK}, {machine['dtype']}; {machine['threads']} threads, {machine['flops'] / 1e9:.0f} GFLOP/s, "
        f"{machine['bytes'] / 1e9:.1f} GB/s",
        f"{'sampler':<22}{'tokens/s':>10}{'calls':>8}{'tokens/call':>12}{'speed-up':>10}{'of cpu time':>13}",
    ]
    for name, found in results["speed"].items():
        bound = "" if found["bound"] is None else f"  ({at_least(found['speedup'], found['bound'])})"
        floor = "" if "over_floor" not in found else f"  {found['over_floor']:.2f} × a call's floor"
        lines.append(
            f"{name:<22}{found['tokens_per_second']:>10.2f}{found['calls']:>8.0f}{found['tokens_per_call']:>12.2f}"
            f"{found['speedup']:>10.2f}{found['cpu_speedup']:>13.2f}{bound}{floor}"
        )
    for name, found in results["batch"].items():
        lines.append(
            f"{BATCH} prompts of {PROMPT // BATCH} to {PROMPT} tokens, {name}: "
            f"{found['together']['tokens_per_second']:.1f} tokens/s together, "
            f"{found['alone']['tokens_per_second']:.1f} one at a time: {found['speedup']:.2f} ×"
        )
    return "\n".join([*lines, "", trained_sampling.table(results["trained"])])


def _published(model: Any, prompt: list[int]) -> dict[str, float]:
    import torch

    from benchmarks.published_sampler import published

    began, cpu = time.perf_counter(), time.process_time()
    _, calls = published(model, torch.tensor([prompt]), NEW, BLOCK, NEW)
    return _rates(NEW, calls, time.perf_counter() - began, time.process_time() - cpu)


def _ours(model: Any, given: list[list[int]], settings: dict[str, Any], size: int = 1) -> dict[str, float]:
    from unmask.config.sampler import SamplerConfig
    from unmask.sampling.generate import generate

    # Random networks write stop tokens anywhere, and both sides are to write all tokens.
    values: dict[str, Any] = {"block_size": BLOCK, "eos": "suppress"}
    sampler = SamplerConfig(**(values | settings))
    began, cpu = time.perf_counter(), time.process_time()
    answers = generate(model, given, sampler=sampler, batch_size=size)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return _rates(
        sum(len(answer.token_ids) for answer in answers), sum(answer.stats.nfe for answer in answers), seconds, cpu
    )


def _rates(tokens: int, calls: int, seconds: float, cpu: float) -> dict[str, float]:
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_call": tokens / calls,
        "calls": float(calls),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }
