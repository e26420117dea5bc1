"""The benchmark that DiffusionGemma's presets were chosen by: its run trains, its settings are those that are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import trained_canvases
from unmask import quickstart
from unmask.models.diffusion_gemma.family import FAMILY
from unmask.quickstart import make_problems


def test_the_released_settings_are_the_familys_defaults() -> None:
    assert {name: FAMILY.sampler.values[name] for name in trained_canvases.RELEASED} == trained_canvases.RELEASED


def test_it_measures_every_preset_of_the_family() -> None:
    assert set(FAMILY.sampler.presets) == {"reference", *trained_canvases.PRESETS}


def test_a_short_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_canvases, "SEEDS", 1)
    monkeypatch.setattr(trained_canvases, "CHANGES", ({"steps": 4},))
    monkeypatch.setattr(quickstart, "TRAIN_ROWS", 200)
    values = trained_canvases.configuration(tmp_path / "run", seed=42)
    values["step_scheduler"] |= {"max_steps": 2, "global_batch_size": 4, "local_batch_size": 4, "val_every_steps": None}
    values["validation"] = values["validation_dataset"] = None
    model, tokenizer, test, seconds = trained_canvases.train_on_problems(tmp_path / "run", values)
    held_out = make_problems(200, 200, 42)[1]
    assert test == held_out[80:]
    longest = max(len(tokenizer.encode(problem.answer + "<turn|>", add_special_tokens=False)) for problem in held_out)
    assert longest <= trained_canvases.CANVAS
    found = trained_canvases.measured(model, tokenizer, test[:2])
    assert all(0 < one["calls"] <= 48 for one in found["settings"].values())
    assert found["settings"]["steps 4"]["calls"] <= 4
    assert len(trained_canvases.table(found | {"training_seconds": seconds}).splitlines()) == 2 + len(found["settings"])
