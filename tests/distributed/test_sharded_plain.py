"""What several ranks read and write again has the keys and bytes of what they read, vision part included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.models.weights import read_tensors


@pytest.fixture(scope="module")
def source(gemma_reference: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    gemma_reference().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("experts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_is_read_is_written_again(
    source: Path, run_ranks: Callable[..., list], tmp_path: Path, experts: int
) -> None:
    first, second = run_ranks(2, "rewrite", str(source), str(tmp_path), experts)
    assert second and not set(first) & set(second)  # each file by one rank, and both have some
    assert {path.name for path in tmp_path.iterdir()} == {*first, *second}
    before, after = dict(read_tensors(source)), dict(read_tensors(tmp_path))
    twins = {key for key in before if key == "lm_head.weight" or (key not in after and "encoder.language_model" in key)}
    assert set(after) == set(before) - twins and any("vision_tower" in key for key in after)
    assert all(torch.equal(after[key], before[key].float()) for key in after)
