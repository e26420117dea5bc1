"""`--dry-run` shows what a person needs to see, and touches nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from unmask.cli import main

# Peak resident memory of two steps, above what the imports take; prints measured bytes and the estimate of each
# configuration. Each is run in a fork, whose peak is its own.
MEASURE = """
import json, os, sys
import torch
from rich.console import Console
from unmask.assemble import assemble
from unmask.parts import build_parts
from unmask.prepare import prepare
from unmask.config import load_config
from unmask.distributed.runtime import Runtime, build_runtime
from unmask.models.loading import empty_network
from unmask.training.estimate import estimate_memory
from unmask.training.loop import train
import unmask.report.progress, unmask.training.network, unmask.training.run, torch.utils.checkpoint

torch.set_num_threads(1)
build_parts(prepare(load_config(sys.argv[1])))
a = torch.randn(64, 64, requires_grad=True)
torch.optim.AdamW([a], fused=True)
with torch.device("meta"):
    torch.nn.Linear(2, 2)
for path in sys.argv[1:]:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    prepared = prepare(load_config(path))
    with torch.device("meta"):
        shape = empty_network(prepared.plan.family, prepared.plan.config)
    estimate = estimate_memory(prepared.config, prepared.plan, shape)
    runtime = Runtime(torch.device("cpu"), None)
    before = runtime.memory_gib()
    run, start = assemble(prepared, build_runtime(prepared.config.distributed), Console(file=open("/dev/null", "w")))
    train(run, start)
    print(json.dumps([(runtime.memory_gib() - before) * 2**30, estimate.total]), flush=True)
    os._exit(0)
"""


def test_it_shows_the_run_and_writes_nothing(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", dllm__time_sampling="stratified"))
    assert main(["train", "-c", str(path), "--dry-run", "--optimizer.lr", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]
    assert "matmuls in float32 on cpu (distributed.autocast_dtype: auto)" in shown
    assert "lr: 0.5" in shown and "global_batch_size: 4" in shown
    from unmask.models.llada.config import LLaDAConfig
    from unmask.models.llada.model import LLaDA

    fields = {key: value for key, value in tiny.model.items() if key != "model_type"}
    count = sum(parameter.numel() for parameter in LLaDA(LLaDAConfig(**fields)).parameters())
    assert f"{count:,} ({count:,} trained)" in shown
    assert "answers end with  <|endoftext|> or <|eot_id|>" in shown
    assert "estimated memory" in shown and "4 rows = 2 rows × 2 micro-batches, at most 384 tokens" in shown
    rows = re.findall(r"\[(\d)\] (\S*train\.jsonl:\d+)", shown.replace("\n", " "))
    assert [number for number, _ in rows] == ["1", "2", "3"]
    masked = re.findall(r"corrupted: (\d+) of (\d+) supervised", shown)
    assert len(masked) == 3 and all(int(some) <= int(all_) for some, all_ in masked)
    assert shown.count("░") == sum(int(some) for some, _ in masked)


def test_the_corruption_shown_is_that_of_the_first_step(tiny, train_tiny, tmp_path: Path, capsys) -> None:
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1)
    path = tiny.write(tmp_path / "run.yaml", values)
    main(["train", "-c", str(path), "--dry-run"])
    supervised = [int(n) for n in re.findall(r"corrupted: \d+ of (\d+) supervised", capsys.readouterr().out)]
    run = train_tiny(values)
    assert sum(supervised) <= next(e["supervised_tokens"] for e in run.events if e["event"] == "train")


def test_an_adapter_is_counted_as_what_is_trained(tiny, tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from unmask import preview

    estimates = []
    count = preview.estimate_memory
    monkeypatch.setattr(preview, "estimate_memory", lambda *given: estimates.append(count(*given)) or estimates[-1])
    values = tiny.config(tmp_path / "run", peft={"r": 2, "target_modules": ["*.q_proj"]})
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    path = tiny.write(tmp_path / "run.yaml", values)
    trained = 2 * 2 * (32 + 32)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        assert main(["train", "-c", str(path), "--dry-run", "--model.torch_dtype", dtype]) == 0
        assert f"({trained:,} trained)" in capsys.readouterr().out
        estimate = estimates.pop()
        assert estimate.weights == (estimate.parameters - trained) * width + trained * 4  # adapters stay fp32
        assert (estimate.gradients, estimate.head, estimate.optimizer) == (trained * 4, 0, 2 * trained * 4)


def test_a_base_in_four_bits_is_counted_as_half_a_byte_and_its_scales(
    tiny, tiny_base: Path, train_tiny, tmp_path: Path, monkeypatch
) -> None:
    from unmask import preview

    estimates = []
    count = preview.estimate_memory
    monkeypatch.setattr(preview, "estimate_memory", lambda *given: estimates.append(count(*given)) or estimates[-1])
    values = tiny.config(tmp_path / "run", model={"pretrained_model_name_or_path": str(tiny_base)}, peft={"r": 2})
    path = tiny.write(tmp_path / "run.yaml", values)
    for four in ("false", "true"):
        assert main(["train", "-c", str(path), "--dry-run", "--peft.load_in_4bit", four]) == 0
    whole, packed = estimates
    assert (packed.parameters, packed.trainable) == (whole.parameters, whole.trainable)
    run = train_tiny({**values, "peft": {"r": 2, "load_in_4bit": True}}).events[0]
    assert (run["parameters"], run["trainable_parameters"]) == (whole.parameters, whole.trainable)
    config = json.loads((tiny_base / "config.json").read_text())
    width, hidden = config["d_model"], config["mlp_hidden_size"]
    sizes = [width**2] * 4 + [width * hidden] * 3
    scales = sum(size // 64 + 4 * -(-size // 64 // 256) for size in sizes)  # one byte a block, four for 256 of those
    assert whole.weights - packed.weights == config["n_layers"] * (sum(sizes) * 7 // 2 - scales)


def test_a_hub_model_is_shown_without_its_weights(tiny, tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import huggingface_hub

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/model" and not [pattern for pattern in allow_patterns if "safetensors" in pattern]
        return str(tmp_path / "snapshot")

    shutil.copytree(tiny_base, tmp_path / "snapshot", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    values = tiny.config(tmp_path / "run", model={"pretrained_model_name_or_path": "owner/model"})
    del values["dataset"]["tokenizer"]  # the model's own
    assert main(["train", "-c", str(tiny.write(tmp_path / "run.yaml", values)), "--dry-run"]) == 0
    assert "estimated memory" in capsys.readouterr().out


def test_a_checkpoint_that_would_not_load_is_refused_without_reading_it(
    tiny, tiny_base: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from safetensors.torch import load_file, save_file

    from unmask.models import weights

    def unread(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "_read", unread)
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    values = tiny.config(tmp_path / "run", model={"pretrained_model_name_or_path": str(folder)})
    command = ["train", "-c", str(tiny.write(tmp_path / "run.yaml", values)), "--dry-run"]
    assert main(command) == 0
    capsys.readouterr()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.transformer.wte.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert main(command) == 2
    out, said = capsys.readouterr()
    assert out == "" and said.count("\n") == 1
    assert f"{folder}: tensor 'model.transformer.wte.weight' is missing (1 in all)" in said


def test_the_memory_estimate_is_near_what_is_measured(tiny, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 600}]} for _ in range(16)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {**tiny.model, "d_model": 192, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 512}
    paths = []
    for checkpointing in (False, True):
        values = tiny.config(
            tmp_path / "run",
            model__config={**model, "max_sequence_length": 512},
            dataset__path_or_dataset_id=str(tmp_path / "long.jsonl"),
            dataset__seq_length=512,
            step_scheduler__global_batch_size=4,
            step_scheduler__local_batch_size=4,
            step_scheduler__max_steps=2,
            distributed__activation_checkpointing=checkpointing,
            checkpoint__enabled=False,
        )
        paths.append(str(tiny.write(tmp_path / f"{checkpointing}.yaml", values)))
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    words = [sys.executable, "-c", MEASURE, *paths]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[0][0] > found[1][0]
    for measured, estimated in found:
        assert estimated == pytest.approx(measured, rel=0.4), (measured / 2**20, estimated / 2**20)


@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_the_heads_gradient_that_a_loss_holds_is_counted(tiny, gemma_values, tmp_path: Path, family: str) -> None:
    """One, however many terms the loss has; and a lookup's beside it, where the head is the embedding."""
    import torch
    from rich.console import Console

    from unmask.assemble import assemble
    from unmask.config import config_from_mapping
    from unmask.distributed.runtime import build_runtime
    from unmask.prepare import prepare
    from unmask.training.estimate import estimate_memory

    changes = {}
    if family == "diffusion_gemma":
        ids = {"vocab_size": 264, "pad_token_id": 257, "eos_token_id": 257, "max_position_embeddings": 256}
        changes = {"model": {"config": gemma_values(**ids)}, "dllm": {"mode": "block_diffusion"}}
    prepared = prepare(config_from_mapping(tiny.config(tmp_path, **changes)))
    run, _ = assemble(prepared, build_runtime(prepared.config.distributed, prepared.degrees), Console(quiet=True))
    head = run.model.head.weight
    held = []
    noisy = run.objective.corrupt(next(iter(run.loader))[0], run.noise)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == head.shape and tensor.data_ptr() != head.data_ptr():
            held.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.objective.loss(run.model, noisy)
    loss.total.backward()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run.objective.loss(run.model, noisy).total.backward()
    run.metrics.close()
    assert len(held) == 1
    assert len(loss.terms) == (1 if family == "llada" else 2)
    counted = estimate_memory(prepared.config, prepared.plan, run.model).head
    assert counted == held[0] * (1 if family == "llada" else 2)
    blocks = [e for e in profile.kineto_results.events() if e.name() == "[memory]" and abs(e.nbytes()) == held[0]]
    assert max(accumulate(e.nbytes() for e in sorted(blocks, key=lambda e: e.start_ns()))) == counted


def test_answers_that_see_later_turns_are_said_before_a_run_and_at_its_start(
    tiny, train_tiny, tmp_path: Path, capsys
) -> None:
    turns = [{"role": role, "content": "4"} for role in ("user", "assistant")]
    rows = [{"messages": turns * count} for count in (1, 1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "dataset.answers: all: 3 of 7 answers see later turns of their conversations (in 4 rows)"
    for answers in ("all", "last", None):
        changes = {"dataset__path_or_dataset_id": str(tmp_path / "rows.jsonl"), "dataset__answers": answers}
        values = tiny.config(tmp_path / f"run_{answers}", step_scheduler__max_steps=1, **changes)
        main(["train", "-c", str(tiny.write(tmp_path / "run.yaml", values)), "--dry-run"])
        shown = " ".join(capsys.readouterr().out.split())
        assert (said in shown) == (said in train_tiny(values).output) == (answers == "all")
        assert f"answers: {answers or 'one'}" in shown


def test_every_row_is_rendered_so_a_late_one_that_the_template_refuses_is_named(
    tiny, tmp_path: Path, fixtures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = fixtures / "reports"
    changes = {
        "dataset__path_or_dataset_id": str(reports / "late_alternating.jsonl"),
        "dataset__chat_template": str(reports / "alternating.jinja"),
    }
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", **changes))
    assert main(["train", "-c", str(path), "--dry-run"]) == 2
    out, said = capsys.readouterr()
    lines = (reports / "late_alternating.jsonl").read_text().splitlines()
    line = 1 + next(number for number, row in enumerate(lines) if row.count('"user"') > 1)
    assert line > 32 and f"late_alternating.jsonl:{line}: " in said and "roles must alternate" in said
    assert out == "" and said.count("\n") == 1
    assert main(["train", "-c", str(path), "--dry-run", "--dataset.on_malformed", "skip"]) == 0
    out = capsys.readouterr().out
    assert "rows checked      all 40 rows rendered and tokenised" in out
    assert f"leftout1rows:malformed(first:{reports / 'late_alternating.jsonl'}:{line}:" in "".join(out.split())


def test_validation_rows_are_checked_too(tiny, tmp_path: Path, fixtures: Path, capsys) -> None:
    rows = tiny.validation(
        path_or_dataset_id=str(fixtures / "reports" / "late_alternating.jsonl"),
        chat_template=str(fixtures / "reports" / "alternating.jinja"),
    )
    values = tiny.config(tmp_path / "run", validation_dataset=rows)
    values["dataset"]["chat_template"] = rows["chat_template"]
    path = tiny.write(tmp_path / "run.yaml", values)
    assert main(["train", "-c", str(path), "--dry-run"]) == 2
    assert "set validation_dataset.on_malformed: skip" in capsys.readouterr().err
