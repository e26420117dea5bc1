"""What a dry run counts of memory and disk, against what tiny runs allocate and write."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.assemble import assemble
from unmask.cli import main
from unmask.config import config_from_mapping
from unmask.config.model import ModelConfig
from unmask.distributed.processes import Degrees
from unmask.distributed.runtime import build_runtime
from unmask.models.loading import build_model, save_model
from unmask.models.registry import plan_model
from unmask.prepare import Prepared, prepare
from unmask.training import needs
from unmask.training.estimate import CONTEXT_BYTES, estimate_memory
from unmask.training.loop import train
from unmask.training.needs import count_needs
from unmask.training.network import moments, weights
from unmask.training.run import ResumePoint, TrainingRun

CUDA = torch.device("cuda")  # where a run would be; nothing is put there


class Narrowed(TorchDispatchMode):
    """Notes how many bytes of copies of given parameters in bf16 live, and the largest gradient of a lookup."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sources = {parameter.data_ptr() for parameter in parameters}
        self.copies: list[tuple[StorageWeakRef, int]] = []
        self.most = self.lookups = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        narrowed = func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16
        if narrowed and args[0].data_ptr() in self.sources:
            storage = out.untyped_storage()
            self.copies.append((StorageWeakRef(storage), storage.nbytes()))
            self.most = max(self.most, self.alive())
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.lookups = max(self.lookups, out.nbytes)
        return out

    def alive(self) -> int:
        self.copies = [(storage, size) for storage, size in self.copies if not storage.expired()]
        return sum(size for _, size in self.copies)


@pytest.fixture
def started(tiny, tiny_base: Path, gemma_values: Callable[..., dict], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that assembles a tiny run of a family, from a base checkpoint if it has an adapter."""

    def start(family: str, peft: dict | None, **changes: Any) -> tuple[Prepared, TrainingRun]:
        model: dict[str, Any] = {"config": tiny.model}
        if family == "diffusion_gemma":
            ids = {"vocab_size": 264, "pad_token_id": 257, "eos_token_id": 257, "max_position_embeddings": 256}
            model, changes["dllm"] = {"config": gemma_values(**ids)}, {"mode": "block_diffusion"}
        if peft is not None:
            fresh = plan_model(ModelConfig(config=model["config"]))
            (base := tmp_path / "base").mkdir()
            save_model(build_model(fresh, None), fresh, base)
            model, changes["peft"] = {"pretrained_model_name_or_path": str(base)}, peft
        (tmp_path / "run").mkdir()
        prepared = prepare(config_from_mapping(tiny.config(tmp_path / "run", model=model, **changes)))
        runtime = build_runtime(prepared.config.distributed, prepared.degrees)
        return prepared, assemble(prepared, runtime, Console(quiet=True))[0]

    return start


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("peft", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_copies_of_weights_in_the_matmuls_dtype(started, family: str, peft: dict | None, checkpointing: bool) -> None:
    precision = {"distributed__autocast_dtype": "bfloat16", "distributed__activation_checkpointing": checkpointing}
    prepared, run = started(family, peft, **precision)
    counted = estimate_memory(prepared.config, prepared.plan, run.model).casts
    noisy = run.objective.corrupt(next(iter(run.loader))[0], run.noise)
    head: Any = run.model.head
    with Narrowed(p for p in run.model.parameters() if p is not head.weight) as seen:
        with run.runtime.autocast():
            loss = run.objective.loss(run.model, noisy)
            forward = seen.alive()
        loss.total.backward()
    run.metrics.close()
    if peft is None and (family == "llada" or not checkpointing):
        assert forward == counted > 0
    # Of a frozen network the first layer's inputs need no gradients, so autograd keeps fewer of its weights.
    assert 0.75 * counted <= seen.most <= counted


def test_a_lookups_gradient_is_counted_where_the_head_is_frozen(started) -> None:
    prepared, run = started("llada", {"r": 2, "modules_to_save": ["*.wte"]})
    noisy = run.objective.corrupt(next(iter(run.loader))[0], run.noise)
    with Narrowed([]) as seen:
        run.objective.loss(run.model, noisy).total.backward()
    run.metrics.close()
    assert estimate_memory(prepared.config, prepared.plan, run.model).head == seen.lookups > 0


@pytest.mark.parametrize("peft", [None, {"r": 2}], ids=["full", "lora"])
def test_what_a_save_pins_and_writes(started, peft: dict | None) -> None:
    prepared, run = started("llada", peft, step_scheduler__max_steps=1)
    config, plan, model = prepared.config, prepared.plan, run.model
    train(run, ResumePoint(0, None, ()))
    run.metrics.close()
    whole = estimate_memory(config, plan, model, CUDA)
    counted = count_needs(config, plan, model, whole, None, Degrees(), CUDA, 1)
    saved = run.saver._network
    staged = [tensor for tensor in (*weights(saved).values(), *moments(saved).values()) if tensor.dim()]
    assert counted.staging == sum(tensor.nbytes for tensor in staged) > 0
    written = [load_file(file) for file in (run.root / "step_1").rglob("*.safetensors")]
    assert counted.checkpoint == sum(tensor.nbytes for each in written for tensor in each.values() if tensor.dim())
    assert (counted.kept, counted.disk) == (1, counted.checkpoint)
    assert whole.context == CONTEXT_BYTES and estimate_memory(config, plan, model, torch.device("cpu")).context == 0
    there = count_needs(config, plan, model, whole, None, Degrees(), torch.device("cpu"), 1)
    assert (there.staging, there.training) == (0, whole.total)


def test_what_the_machine_lacks_is_said(tiny, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", step_scheduler__ckpt_every_steps=1))
    usage = namedtuple("usage", "free")
    assert main(["train", "-c", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "host memory  " in shown and "programs 1.86 (assumed) + training 0.0" in shown and "warning" not in shown
    assert "disk  " in shown and "a checkpoint 0.00, at most 4 at once" in shown.replace("\n", " ")
    monkeypatch.setattr(needs, "host_memory", lambda: 2**30)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: usage(1000))
    assert main(["train", "-c", str(path), "--dry-run"]) == 0
    shown = "".join(capsys.readouterr().out.split())  # lines end where the terminal does
    assert "warning:thismachinehas1.0GiBofmemory,andtherunneeds1.9" in shown
    assert f"warning:{tmp_path}has0.0GiBfree,andtherun'scheckpointsneed0.0;lower" in shown
