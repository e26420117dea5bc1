"""A rank reads the slices that it keeps, and never holds more than its shard and a little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unmask.config.model import ModelConfig
from unmask.models.loading import empty_network
from unmask.models.registry import plan_model
from unmask.models.weights import save_weights

SIZES = {"d_model": 512, "n_heads": 8, "n_layers": 8, "mlp_hidden_size": 2048, "vocab_size": 8192}


@pytest.fixture(scope="module")
def ones(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 42 M fp32 parameters that are all 1."""
    folder = tmp_path_factory.mktemp("ones")
    values = {**tiny.model, **SIZES}
    plan = plan_model(ModelConfig(config=values))
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in empty_network(plan.family, plan.config).state_dict().items()}
    save_weights(((key, torch.ones(shape)) for key, shape in shapes.items()), folder, 50_000_000)
    (folder / "config.json").write_text(json.dumps(plan.config_json))
    return folder


@pytest.mark.parametrize("trained", [True, False], ids=["to-train", "to-answer"])
def test_peak_memory_is_a_shard_and_a_layer(ones: Path, run_ranks, trained: bool) -> None:
    width, hidden = SIZES["d_model"], SIZES["mlp_hidden_size"]
    layer = 4 * (4 * width * width + 3 * width * hidden)
    whole = 8 * layer + 2 * 4 * SIZES["vocab_size"] * width
    ranks = run_ranks(2, "load_peak", str(ones), trained)
    for rank in ranks:
        assert rank["shard"] == pytest.approx(whole / 2, rel=0.01)
        assert rank["risen"] < rank["shard"] + layer < 0.7 * whole
    assert ranks[0]["sum"] == pytest.approx(whole / 4, rel=0.001)  # every parameter is there once, and is a 1
