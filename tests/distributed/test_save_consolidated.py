"""`checkpoint.save_consolidated` on two ranks: which checkpoints other tools can read, and that they hold the run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmask
from unmask.models.sharded_folder import read_sharded
from unmask.training.checkpoint import verify

IDS = torch.tensor([[5, 17, 261, 40], [257, 3, 200, 261]])


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("every", {1, 2}),
        pytest.param("final", {2}, marks=pytest.mark.slow),
        pytest.param("false", set(), marks=pytest.mark.slow),
    ],
)
def test_which_checkpoints_are_plain_folders(
    tiny, run_ranks: Callable[..., list], tmp_path: Path, value: str, plain: set[int]
) -> None:
    settings = tiny.config(tmp_path / "run", step_scheduler__ckpt_every_steps=1, step_scheduler__max_steps=2)
    path = tiny.write(tmp_path / "run.yaml", settings)
    assert run_ranks(2, "command", ["train", "-c", str(path), "--checkpoint.save_consolidated", value]) == [0, 0]
    for step in (1, 2):
        folder = tmp_path / "run" / f"step_{step}"
        verify(folder)
        shards = read_sharded(folder)
        assert (folder / "model.safetensors").is_file() == (step in plain)
        if step in plain:
            stored = load_file(folder / "model.safetensors")
            assert stored.keys() == shards.keys() and all(torch.equal(stored[key], shards[key]) for key in shards)
        model = unmask.load_model(str(folder))
        model.load_state_dict(shards)  # all keys, and no others
        whole = unmask.load_model(str(folder))
        with torch.no_grad():
            assert torch.equal(whole.logits(whole(IDS)), model.logits(model(IDS)))  # pyright: ignore[reportCallIssue]
        assert {"config.json", "config.yaml", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
