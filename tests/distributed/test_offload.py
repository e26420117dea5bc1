"""Law: `offload_policy: cpu` keeps shards on the host, and buffers, which FSDP2 never moves, where the network runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unmask.distributed import inference
from unmask.distributed.inference import JointCalls
from unmask.distributed.ranks import ALONE
from unmask.models.family import ShardPlan
from unmask.report.metrics import read_metrics


def test_shards_are_on_the_host_and_buffers_where_the_network_runs(gemma_values, run_ranks) -> None:
    # The device is one that a CPU's process has too, and on which nothing can be mistaken for the host's.
    places = run_ranks(2, "offloaded_places", gemma_values(), "meta")
    assert places == [{"parameters": {"cpu"}, "buffers": {"meta"}}] * 2


def test_an_offloaded_run_saves_and_resumes_as_any_other(tiny, run_ranks, tmp_path: Path) -> None:
    def values(name: str, steps: int) -> dict[str, Any]:
        return tiny.config(
            tmp_path / name,
            step_scheduler__max_steps=steps,
            validation_dataset=tiny.validation(),
            lr_scheduler__lr_decay_style="constant",
            clip_grad_norm__max_norm=0.1,
        )

    for steps in (2, 4):
        assert run_ranks(2, "train_offloaded", values("offloaded", steps)) == ["finished", "finished"]
    run_ranks(2, "train", values("device", 4))
    numbers = []
    for name in ("offloaded", "device"):
        events = read_metrics(tmp_path / name / "metrics.jsonl")
        numbers.append([event[name] for name in ("loss", "grad_norm") for event in events if event["event"] == "train"])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6) and len(numbers[0]) == 8
    ours, theirs = (load_file(tmp_path / name / "latest" / "model.safetensors") for name in ("offloaded", "device"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-7)


class Blocks(nn.Module):
    """A network that notes where the tokens of each pass are; its weights, offloaded, are elsewhere."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.config, self.places = None, places
        self.blocks = nn.ModuleList([nn.Linear(1, 1)])

    def forward(self, ids: torch.Tensor) -> None:
        self.places.append(ids.device.type)


def test_a_helping_pass_runs_where_the_network_does(monkeypatch: pytest.MonkeyPatch) -> None:
    family: Callable[..., Any] = lambda _: type("Family", (), {"shard": ShardPlan(blocks="blocks")})  # noqa: E731
    monkeypatch.setattr(inference, "family_of", family)
    places: list[str] = []
    with JointCalls(Blocks(places), ALONE, torch.device("meta")):
        pass
    assert places == ["meta"]
