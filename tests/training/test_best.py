"""The checkpoint of the best evaluation is there, whatever else is saved, removed, killed or resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from unmask.errors import CheckpointError, ConfigError
from unmask.training import checkpoint
from unmask.training.checkpoint import Best, better, stored_best, verify

Train = Callable[..., Any]


def test_better_is_less_loss_and_more_exact_match_and_not_equal() -> None:
    def loss(value: object, best: Best | None = None, step: int = 5) -> Best | None:
        return better("validation_loss", best, {"validation": {"loss": value}}, step)

    assert loss(2.0) == (first := Best("validation_loss", 2.0, 5))
    assert loss(1.5, first) == Best("validation_loss", 1.5, 5)
    assert loss(2.0, first) is None and loss(2.5, first) is None and loss(float("nan")) is None
    assert loss(1.0, step=0) is None  # before the first step there is no checkpoint
    match = Best("exact_match", 0.5, 5)
    assert better("exact_match", match, {"exact_match": {"exact_match": 0.6}}, 9) == Best("exact_match", 0.6, 9)
    assert better("exact_match", match, {"exact_match": {"exact_match": 0.4}}, 9) is None
    assert better("exact_match", None, {"validation": {"loss": 1.0}}, 9) is None
    assert better(None, None, {"validation": {"loss": 1.0}}, 9) is None
    assert stored_best({"best": asdict(match)}, "exact_match") == match
    assert stored_best({"best": asdict(match)}, "validation_loss") is None and stored_best({}, "exact_match") is None


def scripted(losses: dict[int, float]) -> Any:
    """Return run_training's option that lets the validation losses be these, by step."""

    def measures(_: Any) -> list:
        due = iter(sorted(losses))
        return [lambda _: {"loss": losses[next(due)]}]

    return measures


def config(tiny: Any, root: Path, **changes: Any) -> dict:
    fixed: dict[str, Any] = {
        "validation_dataset": tiny.validation(max_samples=1),
        "step_scheduler__val_every_steps": 2,
        "step_scheduler__max_steps": 8,
        "checkpoint__best_metric": "validation_loss",
        "checkpoint__max_recent_checkpoints": 1,
    }
    return tiny.config(root, **{**fixed, **changes})


LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}


def test_the_best_is_saved_and_kept_though_its_step_saves_nothing(tiny, train_tiny: Train, tmp_path: Path) -> None:
    run = train_tiny(config(tiny, tmp_path), extra_validators=scripted(LOSSES))
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_4", "step_8"}
    assert os.readlink(tmp_path / "best") == "step_4" and os.readlink(tmp_path / "latest") == "step_8"
    verify(tmp_path / "best")
    assert run.outcome.best == Best("validation_loss", 1.0, 4)
    assert [(e["step"], e["value"]) for e in run.events if e["event"] == "best"] == [(2, 3.0), (4, 1.0)]
    assert json.loads((tmp_path / "step_8" / "state.json").read_text())["best"]["step"] == 4


def test_a_run_without_it_has_no_best(tiny, train_tiny: Train, tmp_path: Path) -> None:
    run = train_tiny(config(tiny, tmp_path, checkpoint__best_metric=None), extra_validators=scripted(LOSSES))
    assert run.outcome.best is None and not (tmp_path / "best").exists()
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_8"]


def test_the_best_survives_a_resume(tiny, train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(config(tiny, tmp_path, step_scheduler__max_steps=6), extra_validators=scripted({2: 1.0, 4: 2.0, 6: 1.5}))
    again = train_tiny(config(tiny, tmp_path), extra_validators=scripted({8: 1.2}))
    assert again.outcome.best == Best("validation_loss", 1.0, 2)
    assert os.readlink(tmp_path / "best") == "step_2" and (tmp_path / "step_2" / "model.safetensors").is_file()
    assert [e["step"] for e in again.events if e["event"] == "best"] == [2]


@pytest.mark.parametrize("moment", ["best", "latest"])
def test_killed_between_the_rename_and_a_link(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The checkpoint of step 4 is in its place, and the link is not: the next start puts it right."""
    whole, calls = checkpoint.point, []

    def fatal(root: Path, link: str, name: str) -> None:
        calls.append((link, name))
        if (link, name) == (moment, "step_4"):
            raise KeyboardInterrupt  # as SIGKILL, nothing is caught
        whole(root, link, name)

    monkeypatch.setattr(checkpoint, "point", fatal)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(config(tiny, tmp_path), extra_validators=scripted(LOSSES))
    assert os.readlink(tmp_path / "best") == "step_2" and (moment, "step_4") in calls
    monkeypatch.undo()
    again = train_tiny(config(tiny, tmp_path), extra_validators=scripted({6: 2.0, 8: 1.0}))
    assert os.readlink(tmp_path / "best") == "step_4" and again.outcome.best.step == 4
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_4", "step_8"}
    assert not list(tmp_path.glob(".*"))


def test_a_best_whose_checkpoint_is_gone_is_forgotten(tiny, train_tiny: Train, tmp_path: Path) -> None:
    import shutil

    train_tiny(config(tiny, tmp_path, step_scheduler__max_steps=4), extra_validators=scripted({2: 1.0, 4: 2.0}))
    shutil.rmtree(tmp_path / "step_2")
    again = train_tiny(config(tiny, tmp_path), extra_validators=scripted({6: 1.5, 8: 1.6}))
    assert f"{tmp_path / 'step_2'}, the best by validation_loss, is gone" in again.output
    assert again.outcome.best == Best("validation_loss", 1.5, 6) and os.readlink(tmp_path / "best") == "step_6"


def test_what_once_was_the_best_stays_when_nothing_is_compared_any_more(tiny, train_tiny: Train, tmp_path: Path):
    train_tiny(config(tiny, tmp_path, step_scheduler__max_steps=4), extra_validators=scripted({2: 1.0, 4: 2.0}))
    train_tiny(config(tiny, tmp_path, checkpoint__best_metric=None), extra_validators=scripted({6: 0.5, 8: 0.5}))
    assert os.readlink(tmp_path / "best") == "step_2"
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_2", "step_8"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"best_metric": "validation_los"},
            "'validation_los' is not one of validation_loss, exact_match (did you mean",
        ),
        ({"best_metric": "exact_match"}, "nothing in this run measures exact_match; add a validation section"),
        ({"best_metric": "validation_loss", "enabled": False}, "keeps a checkpoint, and enabled is false"),
    ],
)
def test_a_metric_that_nothing_measures_is_refused(tiny, tmp_path: Path, changes: dict, message: str) -> None:
    from unmask.config import config_from_mapping

    values = tiny.config(tmp_path, validation_dataset=tiny.validation())
    values["checkpoint"].update(changes)
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(values)
    assert str(caught.value).startswith("checkpoint.best_metric: ") and message in str(caught.value)


def test_validation_loss_needs_validation_rows(tiny, tmp_path: Path) -> None:
    from unmask.config import config_from_mapping

    with pytest.raises(ConfigError, match="measures validation_loss; add a validation_dataset section"):
        config_from_mapping(tiny.config(tmp_path, checkpoint__best_metric="validation_loss"))


def test_a_disk_that_fills_up_leaves_the_best_as_it_was(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmask.training import saver

    original = saver.save_weights

    def full(tensors: Any, folder: Path) -> None:
        if (tmp_path / "step_2").exists():
            raise OSError(28, "No space left on device")
        original(tensors, folder)

    monkeypatch.setattr(saver, "save_weights", full)
    with pytest.raises(CheckpointError, match="step_4"):
        train_tiny(config(tiny, tmp_path), extra_validators=scripted(LOSSES))
    assert os.readlink(tmp_path / "best") == "step_2"
    verify(tmp_path / "best")
