"""What several ranks read and save again has the keys and bytes of what they read, vision part included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException

from unmask.models.folders import stored_tensors
from unmask.models.weights import read_tensors

VISION = "model.encoder.vision_tower."


@pytest.fixture(scope="module")
def source(gemma_reference: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose vision part holds a scalar and integers as well."""
    folder = tmp_path_factory.mktemp("source")
    gemma_reference().save_pretrained(folder)
    odd = {VISION + "clip": torch.tensor(0.25), VISION + "position_ids": torch.arange(5)}
    file = folder / "model.safetensors"
    save_file({**load_file(file), **odd}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("experts", "consolidated"),
    [
        pytest.param(1, "every", marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, "every"),
        pytest.param(2, False),
    ],
)
def test_what_is_read_is_written_again(
    source: Path, run_ranks: Callable[..., list], tmp_path: Path, experts: int, consolidated: object
) -> None:
    run_ranks(2, "rewrite", str(source), str(tmp_path), experts, consolidated)
    folder = tmp_path / "step_1"
    stored = stored_tensors(folder)
    assert len({chunk.file for entry in stored.values() for chunk in entry.chunks}) > 3
    before, after = dict(read_tensors(source)), dict(read_tensors(folder))
    twins = {key for key in before if key == "lm_head.weight" or (key not in after and "encoder.language_model" in key)}
    assert set(after) == set(before) - twins and VISION + "clip" in after
    for key, tensor in after.items():
        expected = before[key] if key.startswith(VISION) else before[key].float()
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), key
    if consolidated:
        assert {path.name for path in folder.iterdir() if path.is_dir()} == set()
    else:  # torch's own reader takes them as well
        theirs = {key: torch.zeros_like(tensor) for key, tensor in after.items()}
        with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
            load(theirs, storage_reader=HuggingFaceStorageReader(str(folder / "sharded")), no_dist=True)
        assert all(torch.equal(theirs[key], tensor) for key, tensor in after.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_why_torch_does_not_consolidate_here(tmp_path: Path) -> None:
    """When this fails, torch has learnt it, and `Saver._complete_weights` can leave it to torch."""

    def consolidated(name: str, tensor: torch.Tensor) -> torch.Tensor:
        shutil.rmtree(tmp_path, ignore_errors=True)
        writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True, enable_consolidation=True)
        save({name: tensor}, storage_writer=writer, no_dist=True)
        return load_file(tmp_path / "model-00001-of-00001.safetensors")[name]

    assert torch.equal(consolidated("matrix", torch.ones(2, 3)), torch.ones(2, 3))
    assert consolidated("scalar", torch.tensor(0.25)) == 0
    with pytest.raises(CheckpointException):
        consolidated("integers", torch.arange(3))
