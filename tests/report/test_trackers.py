"""Trackers hear what the log holds, and a missing one is named before a model loads."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from unmask.config.results import WandbConfig
from unmask.errors import MissingDependencyError
from unmask.report.trackers import check_tracker, numbers, open_tracker

EVENT = {"event": "train", "step": 3, "loss": 0.5, "lr": 1e-3, "time": 12.0, "note": "text", "good": True}


def test_only_numbers_are_passed_on() -> None:
    assert numbers(EVENT) == {"train/loss": 0.5, "train/lr": 1e-3}


@pytest.mark.parametrize("section", [None, WandbConfig(enable=False)])
def test_no_tracker_without_being_asked(section: WandbConfig | None, tmp_path: Path) -> None:
    check_tracker(section)
    assert open_tracker(section, tmp_path, {}) is None


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_one_is_named_with_the_command(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    section = WandbConfig(tracker=name)
    for call in (lambda: check_tracker(section), lambda: open_tracker(section, tmp_path, {})):
        with pytest.raises(MissingDependencyError, match=rf"pip install 'unmask\[{name}\]'.*wandb.enable: false"):
            call()


class Fake(types.ModuleType):
    """What this package uses of wandb and of trackio, keeping what it was told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[dict, int]] = []
        self.finished = False

    def init(self, **options: Any) -> Fake:
        self.started = options
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_hears_every_event(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    tracker = open_tracker(WandbConfig(tracker=name, project="p", name="n"), tmp_path, {"seed": 1})
    assert tracker is not None
    tracker.log(EVENT)
    tracker.close()
    assert (fake.started["project"], fake.started["name"], fake.started["config"]) == ("p", "n", {"seed": 1})
    assert fake.logged == [({"train/loss": 0.5, "train/lr": 1e-3}, 3)] and fake.finished


def test_wandb_is_told_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    open_tracker(WandbConfig(entity="team", mode="offline"), tmp_path, {})
    assert (fake.started["entity"], fake.started["mode"], fake.started["dir"]) == ("team", "offline", str(tmp_path))


def test_tensorboard_writes_what_it_hears(tmp_path: Path) -> None:
    section = WandbConfig(tracker="tensorboard")
    check_tracker(section)
    tracker = open_tracker(section, tmp_path, {})
    assert tracker is not None
    tracker.log(EVENT)
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("train/loss")] == [(3, 0.5)]
