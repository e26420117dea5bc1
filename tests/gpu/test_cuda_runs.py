"""Sampling, training, resuming and sharding through the commands on a CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.config.sampler import SamplerConfig
from unmask.models.loading import load_model
from unmask.sampling.backends import replay
from unmask.sampling.generate import generate

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


def train(path: Path, *words: str) -> None:
    command = [sys.executable, "-m", "unmask.train", "-c", str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_golden_samples(fixtures: Path, cuda):
    cases = json.loads((fixtures / "llada_tiny" / "expected.json").read_text())["generate"]
    reference = load_file(fixtures / "llada_tiny" / "expected.safetensors")
    model = load_model(str(fixtures / "llada_tiny"), "float32", cuda)
    prompt = reference["generate.prompt"]
    for case, arguments in cases.items():
        if case == "left_padded":
            continue
        sampler = SamplerConfig(
            steps=arguments["steps"],
            max_new_tokens=arguments["gen_length"],
            block_size=arguments["block_length"],
            cfg_scale=arguments.get("cfg_scale", 0.0),
        )
        found = generate(model, prompt.tolist(), sampler=sampler)
        expected = reference[f"generate.{case}.output"][:, prompt.shape[1] :]
        assert [answer.token_ids for answer in found] == expected.tolist(), case


@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_a_seed_draws_the_same_on_both_devices(fixtures: Path, cuda, family):
    folder = str(fixtures / ("llada_tiny" if family == "llada" else "diffusion_gemma_step"))
    sampler = (
        SamplerConfig(max_new_tokens=24, block_size=8, temperature=1.0, steps=24)
        if family == "llada"
        else SamplerConfig(steps=4, max_new_tokens=256)
    )
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    there, here = (
        generate(load_model(folder, "float32", device), prompts, sampler=sampler, seed=7)
        for device in (cuda, torch.device("cpu"))
    )
    same = [a == b for x, y in zip(there, here, strict=True) for a, b in zip(x.token_ids, y.token_ids, strict=True)]
    # A draw that falls on the rounding between two tokens may differ, and what follows in that row with it.
    assert sum(same) > 0.9 * len(same)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("llada_tiny", {"block_size": 8, "steps": 24, "temperature": 1.0}),
        ("llada_tiny", {"block_size": 8, "steps": 24, "temperature": 1.0, "cache": "prefix"}),
        ("llada_tiny", {"block_size": 8, "steps": 24, "cache": "dual", "cfg_scale": 1.0}),
        ("diffusion_gemma_step", {"steps": 6, "confidence_threshold": 0.0, "eos": "suppress"}),
        ("diffusion_gemma_step", {"steps": 6, "confidence_threshold": 0.0, "eos": "suppress", "cache": "none"}),
    ],
)
def test_recorded_calls_change_nothing(fixtures: Path, cuda, monkeypatch, folder, settings, batch_size):
    """With prompts of unlike length in a batch, too."""
    model = load_model(str(fixtures / folder), "bfloat16", cuda)
    sampler = SamplerConfig(max_new_tokens=24, **settings)
    recorded: list[replay.Recording] = []
    record = replay._record

    def counted(*arguments) -> replay.Recording:
        recorded.append(record(*arguments))
        return recorded[-1]

    monkeypatch.setattr(replay, "_record", counted)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [4, 3, 2, 8]]
    found = generate(model, prompts, sampler=sampler, batch_size=batch_size)
    assert recorded
    alive = [weakref.ref(recording) for recording in recorded]
    recorded.clear()
    assert len(alive) <= 6  # kinds of calls, not lengths
    assert not any(reference() for reference in alive)  # with the memory that they held
    monkeypatch.setenv(replay.SWITCH, "0")
    expected = generate(model, prompts, sampler=sampler, batch_size=batch_size)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


def test_what_waits_for_the_device_is_not_recorded_and_harms_nothing(cuda):
    def waits(tensor):
        return tensor * float(tensor.sum())

    one, network = torch.ones(1, device=cuda), torch.nn.Linear(1, 1, device=cuda).requires_grad_(False)
    call = replay.replays_for(network)
    call(None, "kind", waits, one)
    with pytest.warns(RuntimeWarning, match="kernel by kernel"):
        assert call(None, "kind", waits, one).item() == 1
    assert call(None, "kind", waits, one).item() == 1
    assert torch.randn(4, device=cuda).isfinite().all()
    later = replay.replays_for(network)
    for number in range(5):
        assert later(None, "kind", lambda tensor: 2 * tensor, number * one).item() == 2 * number
    assert later._kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_equals_the_cpu_run_and_resumes(tiny, tmp_path, dtype):
    runs = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        values = tiny.config(run, distributed__device=device, distributed__autocast_dtype=dtype)
        train(tiny.write(tmp_path / f"{device}.yaml", values))
        runs[device] = losses(run)
    bound = 1e-4 if dtype == "float32" else 2e-2
    assert runs["cuda"] == pytest.approx(runs["cpu"], rel=bound)
    run = tmp_path / "resumed"
    path = tiny.write(
        tmp_path / "resumed.yaml",
        tiny.config(run, distributed__device="cuda", distributed__autocast_dtype=dtype),
    )
    train(path, "--step_scheduler.max_steps", "3", "--lr_scheduler.lr_decay_style", "constant")
    train(path, "--step_scheduler.max_steps", "6", "--lr_scheduler.lr_decay_style", "constant")
    whole = tmp_path / "whole"
    train(path, "--lr_scheduler.lr_decay_style", "constant", "--checkpoint.checkpoint_dir", str(whole))
    assert losses(run) == pytest.approx(losses(whole), rel=bound)  # sums of gradients have no fixed order there


def test_flex_attention_trains(tiny, tmp_path):
    runs = {}
    for kernel in ("sdpa", "flex"):
        run = tmp_path / kernel
        values = tiny.config(run, distributed__device="cuda", distributed__attention=kernel)
        train(tiny.write(tmp_path / f"{kernel}.yaml", values))
        runs[kernel] = losses(run)
    assert runs["flex"] == pytest.approx(runs["sdpa"], rel=2e-3)
