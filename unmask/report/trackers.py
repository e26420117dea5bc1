"""Adapters that pass the run's events on to experiment trackers. Each tracker is an extra, imported when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.config.results import WandbConfig
from unmask.errors import MissingDependencyError


@dataclass(frozen=True)
class Tracker:
    """An open tracker: `log` takes an event as written to metrics.jsonl, `close` ends the run."""

    log: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None]


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return an event's numeric fields as `<event>/<field>`, without step and time; a list's as `<field>/<place>`."""
    listed = [
        (f"{name}/{place}", value)
        for name, values in event.items()
        if isinstance(values, list)
        for place, value in enumerate(values, start=1)
    ]
    return {
        f"{event['event']}/{name}": value
        for name, value in (*event.items(), *listed)
        if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _open_wandb(section: WandbConfig, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    wandb = _import("wandb")
    run = wandb.init(
        project=section.project,
        name=section.name,
        entity=section.entity,
        mode=section.mode,
        dir=str(run_dir),
        config=dict(config),
        resume="allow",
    )
    return Tracker(lambda event: run.log(numbers(event), step=event.get("step")), run.finish)


def _open_trackio(section: WandbConfig, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    trackio = _import("trackio")
    trackio.init(project=section.project, name=section.name, config=dict(config))
    return Tracker(lambda event: trackio.log(numbers(event), step=event.get("step")), trackio.finish)


def _open_tensorboard(section: WandbConfig, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    _import("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(event: Mapping[str, Any]) -> None:
        for name, value in numbers(event).items():
            writer.add_scalar(name, value, event.get("step"))

    return Tracker(log, writer.close)


TRACKERS: dict[str, Callable[[WandbConfig, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _open_wandb,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
}


def open_tracker(section: WandbConfig | None, run_dir: Path, config: Mapping[str, Any]) -> Tracker | None:
    """Open the tracker that the section asks for; None when it asks for none.

    Raises:
        MissingDependencyError: the tracker is not installed.
    """
    if section is None or not section.enable:
        return None
    return TRACKERS[section.tracker](section, run_dir, config)


def check_tracker(section: WandbConfig | None) -> None:
    """Raise MissingDependencyError now, before a model loads, when the tracker is not installed."""
    if section is not None and section.enable:
        spec = importlib.util.find_spec(section.tracker)
        if spec is None or spec.origin is None:  # a plain folder of that name, such as wandb's own logs, has no origin
            raise _missing(section.tracker)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _missing(name) from None


def _missing(name: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"wandb.tracker: {name} is not installed; `pip install 'unmask[{name}]'`, or set wandb.enable: false"
    )
