"""`checkpoint.save_consolidated` on two ranks: which checkpoints other tools can read, and that all hold the run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import unmask
from unmask.models.weights import read_tensors
from unmask.training.checkpoint import verify


@pytest.fixture(scope="module")
def save(tiny, run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    def run(value: str) -> Path:
        root = tmp_path_factory.mktemp(value)
        settings = tiny.config(root / "run", step_scheduler__ckpt_every_steps=1, step_scheduler__max_steps=2)
        path = tiny.write(root / "run.yaml", settings)
        assert run_ranks(2, "command", ["train", "-c", str(path), "--checkpoint.save_consolidated", value]) == [0, 0]
        return root / "run"

    return run


@pytest.fixture(scope="module")
def every(save: Callable[[Any], Path]) -> Path:
    return save("every")


def stored(folder: Path) -> dict[str, Tensor]:
    return dict(read_tensors(folder))


def check(root: Path, plain: set[int]) -> None:
    for step in (1, 2):
        folder = root / f"step_{step}"
        verify(folder)
        assert (folder / "model.safetensors").is_file() == (step in plain)
        assert (folder / "sharded").is_dir() == (step not in plain)
        if step in plain:
            assert load_file(folder / "model.safetensors").keys() == stored(folder).keys()
        unmask.load_model(str(folder)).load_state_dict(stored(folder))  # all keys, and no others
        assert {"config.json", "config.yaml", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_every_checkpoint_is_a_plain_folder(every: Path) -> None:
    check(every, {1, 2})


@pytest.mark.parametrize(("value", "plain"), [("final", {2}), pytest.param("false", set(), marks=pytest.mark.slow)])
def test_parts_hold_what_plain_folders_do(every: Path, save: Callable[[Any], Path], value: str, plain: set) -> None:
    root = save(value)
    check(root, plain)
    for step in (1, 2):
        ours, theirs = stored(root / f"step_{step}"), stored(every / f"step_{step}")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
