"""Law: the command line answers at once; torch and its company load only when work starts."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "datasets", "peft", "matplotlib", "tokenizers", "safetensors", "pandas", "pyarrow"}
HELP = "import sys; from unmask.cli import main; sys.exit(main(['--help']))"


def children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("module", ["unmask", "unmask.cli", "unmask.config"])
def test_the_surface_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    seconds = []
    for _ in range(3):
        before = children_cpu_seconds()
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
        seconds.append(children_cpu_seconds() - before)
        assert "quickstart" in done.stdout
    assert min(seconds) < 0.5


def test_a_network_is_laid_out_without_pytorchs_compiler() -> None:
    """Its import takes longer than loading a small model, and every command lays out a network."""
    code = """
import sys, torch
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA
sizes = dict(d_model=8, n_heads=1, n_layers=1, mlp_hidden_size=8, vocab_size=8, embedding_size=8)
with torch.device("meta"):
    model = LLaDA(LLaDAConfig(**sizes, mask_token_id=7, eos_token_id=6, pad_token_id=6))
assert model.transformer.wte.weight.is_meta and model.transformer.wte.weight.requires_grad
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
