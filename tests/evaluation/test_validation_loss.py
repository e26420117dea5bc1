"""Validation noise never changes: two points of a curve differ by the model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.config import config_from_mapping
from unmask.data.batches import validation_set
from unmask.data.encode import RowEncoder
from unmask.distributed.runtime import Runtime
from unmask.evaluation.validation import fixed_noise, validation_losses
from unmask.models.loading import build_model
from unmask.objectives.mdlm import MDLM
from unmask.parts import build_parts
from unmask.prepare import prepare

RUNTIME = Runtime(torch.device("cpu"), None)


@pytest.fixture(scope="module")
def prepared(tiny):
    return prepare(config_from_mapping(tiny.config(Path("unused"), validation_dataset=tiny.validation())))


@pytest.fixture(scope="module")
def model(prepared):
    return build_model(prepared.plan, "float32", seed=3)


def noise(prepared, local_batch_size: int = 2, seed: int = 42, supervise_padding: bool = False) -> list:
    template = build_parts(prepared).template
    rows = validation_set(
        prepared.validation_rows,
        RowEncoder(prepared.validation_rows, template, prepared.config.validation_dataset),
        local_batch_size=local_batch_size,
        pad_token_id=257,
        supervise_padding=supervise_padding,
    )
    return fixed_noise(MDLM(261, time_sampling="stratified"), rows.batches, seed)


OBJECTIVE = MDLM(261, time_sampling="stratified")


def test_the_same_at_every_call(prepared, model) -> None:
    noisy = noise(prepared)
    first = validation_losses(model.train(), OBJECTIVE, noisy, RUNTIME)
    torch.rand(7)  # the global generator plays no part
    assert validation_losses(model, OBJECTIVE, noisy, RUNTIME) == first
    assert validation_losses(model, OBJECTIVE, noise(prepared), RUNTIME) == first
    assert model.training and first["loss"] == first["mdlm_loss"] > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("supervise_padding", [False, True])
def test_the_same_for_every_batch_size(prepared, model, supervise_padding: bool) -> None:
    values = [
        validation_losses(model, OBJECTIVE, noise(prepared, n, supervise_padding=supervise_padding), RUNTIME)["loss"]
        for n in (1, 2, 6)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_levels_are_spread_over_all_rows(prepared) -> None:
    weights = [part.noisy.weights_BL[row] for part in noise(prepared) for row in range(len(part.noisy.weights_BL))]
    levels = sorted(1 / float(row.max()) for row in weights if float(row.max()) > 0)
    assert len(weights) == 6
    for level in levels:  # a row whose level is low may have no mask at all, and then shows none
        strata = [i for i in range(6) if i / 6 - 1e-3 <= level <= (i + 1) / 6 + 1e-3]
        assert strata
    assert len({min(5, int(level * 6)) for level in levels}) == len(levels)


def test_training_noise_and_validation_noise_differ(prepared) -> None:
    from unmask.rng import NoiseStream

    ids = torch.arange(4)
    train, validation = (
        NoiseStream(42).uniform("mask", 0, ids, 8),
        NoiseStream(42, "validation").uniform("mask", 0, ids, 8),
    )
    assert not torch.equal(train, validation)


def test_a_run_measures_alike_whatever_its_training_draws(tiny, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """A rate of zero freezes the model; every validation of every such run must then agree."""
    found = set()
    for number, changes in enumerate(
        [
            {},
            {"step_scheduler__global_batch_size": 8},
            {"dllm__time_sampling": "stratified"},
            {"dataset__shuffle_seed": 9},
        ]
    ):
        fixed = {"optimizer__lr": 0.0, "step_scheduler__val_every_steps": 1, "step_scheduler__max_steps": 3}
        values = tiny.config(tmp_path / str(number), validation_dataset=tiny.validation(), **fixed, **changes)
        found |= {event["loss"] for event in train_tiny(values).events if event["event"] == "validation"}
    assert len(found) == 1
