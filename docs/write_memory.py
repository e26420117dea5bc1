"""`python docs/write_memory.py`: the tables of distributed.md, what a run of a released model needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from unmask.config import load_config
from unmask.distributed.processes import Degrees
from unmask.models.registry import ModelPlan, family_named
from unmask.training.estimate import Estimate, SharedEstimate, estimate_memory, estimate_shared, network_to_count
from unmask.training.needs import Needs, count_needs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "distributed.md"
# Recipe → the released config.json that its model has; weights are not needed.
RELEASED = {"llada": "llada_8b_instruct", "diffusion_gemma": "diffusiongemma_26b_a4b_it"}
DEVICE = torch.device("cuda")  # of no machine: nothing is put there
NARROW = ("--model.torch_dtype", "bfloat16")
WIDE = ("--distributed.mp_policy", "null")  # weights are gathered as they are stored
TRAINED: dict[str, tuple[str, ...]] = {
    "all, in fp32": (),
    "all, in bf16 with `stochastic_rounding`": (*NARROW, "--optimizer.stochastic_rounding", "true"),
    "LoRA, base in bf16": NARROW,
    "QLoRA, base in 4 bits": (*NARROW, "--peft.load_in_4bit", "true"),
}
HELD = ("weights", "casts", "gradients", "head", "optimizer", "gathered", "buffers", "activations", "context")
RECEIVED = ("weights_received", "gradients_received", "tokens_received")
NAMES = {"casts": "cast", "optimizer": "AdamW", "context": "CUDA, NCCL"}


class Counted(NamedTuple):
    """What one configuration needs."""

    whole: Estimate
    shared: SharedEstimate | None
    needs: Needs


def count(family: str, processes: int, *overrides: str, lora: bool = False, rows: int = 1, copies: int = 1) -> Counted:
    """Count a recipe with these overrides on so many processes, each with a CUDA device."""
    recipe = ROOT / "examples" / "dllm_sft" / f"{family}_{'lora' if lora else 'sft'}.yaml"
    steps = ("--step_scheduler.local_batch_size", str(rows), "--step_scheduler.max_steps", "10000")
    steps += ("--step_scheduler.global_batch_size", str(rows * max(processes, 8)))
    always = ("--distributed.activation_checkpointing", "true", "--distributed.autocast_dtype", "bfloat16")
    config = load_config(recipe, (*always, *steps, *overrides)).config
    values = json.loads((ROOT / "tests" / "fixtures" / RELEASED[family] / "config.json").read_text())
    chosen = family_named(values, "config.json")
    plan = ModelPlan(chosen, chosen.parse_config(values, "config.json"), values, Path(), "owner/model")
    model = network_to_count(config, plan)
    whole = estimate_memory(config, plan, model, DEVICE)
    degrees = Degrees(processes, copies, config.distributed.ep_size if processes > 1 else 1)
    shared = estimate_shared(config, plan, model, whole, degrees, DEVICE) if processes > 1 else None
    return Counted(whole, shared, count_needs(config, plan, model, whole, shared, degrees, DEVICE, 10000))


def fits() -> list[list[str]]:
    """Return what fits where: rows of one sequence of 1024 tokens a device."""
    rows = [["model", "trained", "1 × 24 GB", "1 × 80 GB", "8 × 80 GB", "host, 1 device", "host, 8", "a checkpoint"]]
    for family, name in (("llada", "LLaDA-8B"), ("diffusion_gemma", "DiffusionGemma-26B")):
        for trained, overrides in TRAINED.items():
            lora = "LoRA" in trained
            one = count(family, 1, "--distributed.ep_size", "1", *overrides, lora=lora)
            cells = [_fit(one.whole.total, size) for size in (24, 80)]
            if "QLoRA" in trained:
                cells += ["one process alone", _gb(one.needs.host), "–"]
            else:
                eight = count(family, 8, *overrides, lora=lora)
                assert eight.shared is not None
                cells += [_fit(eight.shared.total, 80), _gb(one.needs.host), _gb(eight.needs.host)]
            rows.append([name, trained, *cells, _gb(one.needs.checkpoint)])
    return rows


def gemma() -> list[list[str]]:
    """Return what one of eight processes holds and receives of DiffusionGemma, one row each."""
    rows = [["", *_heads(RECEIVED)]]
    for experts in ("1", "8"):
        for gathered, override in (("fp32", WIDE), ("bf16", ())):
            shared = count("diffusion_gemma", 8, "--distributed.ep_size", experts, *override).shared
            rows.append([f"`ep_size: {experts}`, {gathered} gathered", *_cells(shared, RECEIVED)])
    return rows


def llada() -> list[list[str]]:
    """Return what a process holds and receives of LLaDA, by devices."""
    rows = [["devices", "rows a process", *_heads(RECEIVED[:2])]]
    for label, processes, local, copies in (
        ("1", 1, 1, 1), ("8, bf16 gathered", 8, 4, 1), ("64, bf16 gathered", 64, 1, 1),
        ("64 = 8 copies × 8, bf16 gathered", 64, 1, 8),
    ):  # fmt: skip
        override = () if copies == 1 else ("--distributed.dp_replicate_size", str(copies))
        counted = count("llada", processes, *override, rows=local, copies=copies)
        rows.append([label, str(local), *_cells(counted.shared or counted.whole, RECEIVED[:2])])
    return rows


def _heads(received: tuple[str, ...]) -> list[str]:
    names = [name.removesuffix("_received") for name in received]
    names[0] = f"receives a step: {names[0]}"
    return [*(NAMES.get(name, name) for name in HELD), "a process holds", *names]


def _cells(estimate: Estimate | SharedEstimate | None, received: tuple[str, ...]) -> list[str]:
    assert estimate is not None
    held = [_short(getattr(estimate, name, 0)) for name in HELD]
    return [*held, _gb(estimate.total), *(_short(getattr(estimate, name, 0)) for name in received)]


def _fit(size: int, gigabytes: int) -> str:
    return f"{_gb(size)}: {'fits' if size < gigabytes * 10**9 else 'no'}"


def _short(size: float) -> str:
    number = size / 1e9
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def written(page: str) -> str:
    """Return the page with the three tables after the heading `What fits where` made anew."""
    before, heading, rest = page.partition("## What fits where\n")
    tables = iter([fits(), gemma(), llada()])

    def table(_: re.Match[str]) -> str:
        head, *rows = next(tables)
        return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))

    return before + heading + re.sub(r"(?:^\|.*\n)+", table, rest, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
