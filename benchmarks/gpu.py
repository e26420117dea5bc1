"""The released sizes on one CUDA device, weights random: LoRA steps and generation. `python -m benchmarks.gpu`.

A network of the released shape runs as fast as the released one; only what depends on the text (how many tokens a call
commits, where an answer ends) is then not what a real checkpoint gives, so generation is timed for a fixed number of
network calls. The dense variants are the same network with logits for every position, as the field's trainers compute
them. One process a case; each prints JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
FOLDERS = {"llada": FIXTURES / "llada_8b_instruct", "diffusion_gemma": FIXTURES / "diffusiongemma_26b_a4b_it"}
# Case → (family, what is timed, its options).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LLaDA-8B LoRA, 4 x 1024, ours": ("llada", "train", {"rows": 4}),
    "LLaDA-8B LoRA, 4 x 1024, dense logits": ("llada", "train", {"rows": 4, "dense": True}),
    "LLaDA-8B LoRA, 8 x 1024, checkpointing": ("llada", "train", {"rows": 8, "checkpointing": True}),
    "LLaDA-8B LoRA, 4 x 1024, compiled": ("llada", "train", {"rows": 4, "compiled": True}),
    "DiffusionGemma-26B LoRA, 1 x 1024": ("diffusion_gemma", "train", {"rows": 1}),
    "DiffusionGemma-26B LoRA, 4 x 1024, checkpointing": (
        "diffusion_gemma", "train", {"rows": 4, "checkpointing": True},
    ),
    # Rows and prompts of unequal length, as data has them: attention has masks.
    "LLaDA-8B LoRA, 4 ragged rows up to 1024": ("llada", "train", {"rows": 4, "ragged": True}),
    "DiffusionGemma-26B LoRA, 4 ragged rows up to 1024, checkpointing": (
        "diffusion_gemma", "train", {"rows": 4, "ragged": True, "checkpointing": True},
    ),
    "LLaDA-8B generate, 1 row": ("llada", "generate", {"rows": 1}),
    "LLaDA-8B generate, 1 row, dual cache": ("llada", "generate", {"rows": 1, "cache": "dual"}),
    "LLaDA-8B generate, 16 rows": ("llada", "generate", {"rows": 16}),
    "DiffusionGemma-26B generate, 1 row": ("diffusion_gemma", "generate", {"rows": 1}),
    "LLaDA-8B generate, 16 ragged rows": ("llada", "generate", {"rows": 16, "ragged": True}),
    "DiffusionGemma-26B generate, 16 rows": ("diffusion_gemma", "generate", {"rows": 16}),
    "DiffusionGemma-26B generate, 16 ragged rows": ("diffusion_gemma", "generate", {"rows": 16, "ragged": True}),
    # Twelve of thirty layers: transformers' class holds encoder and decoder twice until it ties them.
    "DiffusionGemma, 12 layers, generate, 1 row": ("diffusion_gemma", "generate", {"rows": 1, "layers": 12}),
    "DiffusionGemma, 12 layers, generate, 1 row, transformers": ("", "theirs", {"rows": 1, "layers": 12}),
    "DiffusionGemma, 12 layers, generate, 8 rows": ("diffusion_gemma", "generate", {"rows": 8, "layers": 12}),
    "DiffusionGemma, 12 layers, generate, 8 rows, transformers": ("", "theirs", {"rows": 8, "layers": 12}),
}  # fmt: skip
LORA = {"llada": ["*.q_proj", "*.k_proj", "*.v_proj", "*.attn_out"], "diffusion_gemma": ["*.self_attn.*"]}


def run(cases: list[str]) -> dict[str, Any]:
    """Run cases, each in a process of its own; one that fails (out of memory, say) has its message as the result."""
    import torch

    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": {}}
    for case in cases:
        words = [sys.executable, "-m", "benchmarks.gpu", "--child", case]
        done = subprocess.run(words, capture_output=True, text=True)
        lines = (done.stdout or done.stderr).strip().splitlines() or ["no output"]
        results["cases"][case] = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr[-600:]}
        print(f"{case}: {results['cases'][case]}", flush=True)
    return results


def _values(family: str, layers: int | None) -> dict[str, Any]:
    values = json.loads((FOLDERS[family] / "config.json").read_text())
    if layers is not None:
        text = values["text_config"]
        values["text_config"] = {**text, "num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    return values


def _network(family: str, layers: int | None = None) -> Any:
    import torch

    from unmask.models.loading import empty_network
    from unmask.models.registry import family_named

    values = _values(family, layers)
    chosen = family_named(values, "config.json")
    with torch.device("meta"):
        model = empty_network(chosen, chosen.parse_config(values, "config.json")).bfloat16()
    model.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() >= 2:
                tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
            else:
                tensor.fill_(1.0)
    return model.requires_grad_(False)


def _batch(rows: int, length: int, prompt: int, ragged: bool) -> Any:
    import torch

    from unmask.batch import Batch

    row_B1, position_L = torch.arange(rows)[:, None], torch.arange(length)
    there = position_L < length - ragged * (67 * row_B1 % 192)
    supervised = there & (position_L >= prompt - ragged * (41 * row_B1 % 192))
    return Batch(
        input_ids_BL=torch.randint(1000, 100_000, (rows, length), generator=torch.Generator().manual_seed(1)),
        supervised_BL=supervised,
        attention_mask_BL=there.expand(rows, length),
        answer_lengths_B=supervised.sum(1),
        sample_ids_B=torch.arange(rows),
        epoch=0,
        slots_B=torch.arange(rows),
        global_rows=rows,
        cut_B=torch.zeros(rows, dtype=torch.bool),
        peers_P=torch.arange(rows),
    )


def _train(
    family: str,
    rows: int,
    dense: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    ragged: bool = False,
) -> dict[str, float]:
    import torch

    from unmask.config.model import PeftConfig
    from unmask.config.training import OptimizerConfig
    from unmask.distributed.runtime import Runtime, compile_blocks
    from unmask.objectives.canvas import CanvasDiffusion
    from unmask.objectives.mdlm import MDLM
    from unmask.rng import NoiseStream
    from unmask.training.lora import attach
    from unmask.training.optim import build_optimizer
    from unmask.training.step import train_step

    model = _network(family)
    config = model.config
    for module in model.modules():
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = checkpointing
    if compiled:
        compile_blocks(model.transformer)
    attach(model, PeftConfig(r=16, lora_alpha=32, target_modules=LORA[family]), "")
    model.train()
    objective: Any = (
        MDLM(config.mask_token_id)
        if family == "llada"
        else CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id)
    )
    if dense:
        objective = _Dense(objective)
    runtime = Runtime(torch.device("cuda"), torch.bfloat16)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-4), model)
    batch = _batch(rows, 1024, 256 if family == "llada" else 768, ragged)
    tokens = int(batch.attention_mask_BL.sum())

    def step(number: int) -> Any:
        return train_step(model, objective, [batch], NoiseStream(number), optimizer, runtime, 1.0)

    steps = [functools.partial(step, number) for number in range(8)]
    seconds = statistics.median(_timed(steps)[3:])
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and not _looked_up(n))
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        # Forward and the gradient of the activations; a frozen matrix has no gradient of its own. With experts a token
        # meets few of the matrices.
        **({"tflops_of_layers": 4 * matrices * tokens / seconds / 1e12} if family == "llada" else {}),
    }


def _looked_up(name: str) -> bool:
    return "wte" in name or "embed_tokens" in name or name.endswith("transformer.ff_out.weight")


class _Dense:
    """The masked objective with logits for every position at once, in fp32."""

    def __init__(self, objective: Any) -> None:
        self.corrupt = objective.corrupt

    def loss(self, model: Any, noisy: Any, counts: Any) -> Any:
        """Return the same terms."""
        import torch.nn.functional as F

        from unmask.batch import LossTerm, LossTerms

        logits_BLV = model.logits(model(noisy.noisy_ids_BL, noisy.attention_mask_BL)).float()
        entropy_N = F.cross_entropy(logits_BLV.flatten(0, 1), noisy.clean.input_ids_BL.flatten(), reduction="none")
        total = (entropy_N * noisy.weights_BL.flatten()).sum()
        return LossTerms(total / counts["mdlm"], {"mdlm": LossTerm(total.detach(), noisy.counts["mdlm"])})


def _timed(steps: Sequence[Callable[[], Any]]) -> list[float]:
    import torch

    seconds = []
    for step in steps:
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def _generate(
    family: str, rows: int, layers: int | None = None, cache: Any = "none", ragged: bool = False
) -> dict[str, float]:
    import torch

    from unmask.config.sampler import SamplerConfig
    from unmask.sampling.generate import generate

    model = _network(family, layers).eval()
    generator = torch.Generator().manual_seed(2)
    lengths = [256 - ragged * (41 * row % 192) for row in range(rows)]
    prompts = [torch.randint(1000, 100_000, (length,), generator=generator).tolist() for length in lengths]
    sampler = (
        SamplerConfig(steps=32, max_new_tokens=128, block_size=32, eos="suppress", cache=cache)
        if family == "llada"
        else SamplerConfig(steps=16, max_new_tokens=256, eos="suppress", confidence_threshold=0.0)
    )
    calls = 32 if family == "llada" else 16
    once = functools.partial(generate, model, prompts, sampler=sampler, batch_size=rows)
    answers = [functools.partial(once, seed=number) for number in range(4)]
    seconds = statistics.median(_timed(answers)[1:])
    return {
        "seconds": seconds,
        "milliseconds_a_call": 1000 * seconds / calls,
        "row_calls_per_second": rows * calls / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _theirs(family: str, rows: int, layers: int) -> dict[str, float]:
    """Time transformers' `generate` for as many calls of as many canvases."""
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    values = {key: value for key, value in _values("diffusion_gemma", layers).items() if key != "model_type"}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64,
    }  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**values, vision_config=vision)).eval()
    torch.set_default_dtype(torch.float32)
    prompts = torch.randint(1000, 100_000, (rows, 256), generator=torch.Generator().manual_seed(2)).cuda()
    options = {
        "sampler_config": EntropyBoundSamplerConfig(entropy_bound=0.1), "t_min": 0.4, "t_max": 0.8,
        "stability_threshold": 1, "confidence_threshold": 1e-9, "eos_token_id": [1], "pad_token_id": 0,
        "max_new_tokens": 256, "max_denoising_steps": 16,
    }  # fmt: skip
    seconds = statistics.median(_timed([lambda: model.generate(prompts, **options)] * 4)[1:])
    return {
        "seconds": seconds,
        "milliseconds_a_call": 1000 * seconds / 16,
        "row_calls_per_second": rows * 16 / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Run the cases named, or all; write the results as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        family, kind, options = CASES[arguments.cases[0]]
        print(json.dumps({"train": _train, "generate": _generate, "theirs": _theirs}[kind](family, **options)))
        return
    results = run(arguments.cases or list(CASES))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
