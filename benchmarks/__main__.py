"""`python -m benchmarks [NAME ...]`: run benchmarks, print their tables, write JSON into benchmarks/results/.

`python -m benchmarks.structure` and `python -m benchmarks.gpu` are commands of their own.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

from benchmarks import (
    block_diffusion_step,
    evaluation,
    generation,
    lora_experts,
    sampling,
    scaling,
    start_up,
    trained_canvases,
    training_step,
)

BENCHMARKS = {
    "training_step": training_step,
    "block_diffusion_step": block_diffusion_step,
    "start_up": start_up,
    "lora_experts": lora_experts,
    "generation": generation,
    "sampling": sampling,
    "trained_canvases": trained_canvases,
    "evaluation": evaluation,
    "scaling": scaling,
}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        own = f"; run python -m benchmarks.{unknown[0]}" if unknown[0] in ("structure", "gpu") else ""
        parser.error(f"{unknown[0]!r} is not one of {', '.join(BENCHMARKS)}{own}")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    for name in names:
        results = {"python": platform.python_version(), "cpu": _cpu(), **BENCHMARKS[name].run()}
        print(f"\n{name}: {results['cpu']}\n{BENCHMARKS[name].table(results)}", flush=True)
        (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _cpu() -> str:
    import torch

    return str(torch.cpu.get_capabilities().get("cpu_name", platform.processor())).strip()


if __name__ == "__main__":
    main()
