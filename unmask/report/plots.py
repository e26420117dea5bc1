"""Loss curves from the run's own log. Lines differ in style as well as colour, so that a grey print still reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.places import part_of
from unmask.report.metrics import FILE, read_metrics

_STYLES = ("-", "--", "-.", ":")
# The parts of the noise levels for which validation is reported apart.
LEVELS = ("0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %")


def find_log(run: Path) -> Path:
    """Return the log of a run directory (or of a checkpoint in it); DataError when there is none."""
    for folder in (run, run.parent):
        if (folder / FILE).is_file():
            return folder / FILE
    inside = sorted(child.name for child in run.iterdir() if (child / FILE).is_file()) if run.is_dir() else []
    if inside:
        raise DataError(f"{run}: no {FILE} here; did you mean {run / inside[0]}?")
    raise DataError(f"{run}: no {FILE} here; give the run directory that `unmask train` wrote (checkpoint_dir)")


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Return the bias-corrected exponential moving average (Kingma & Ba 2015, algorithm 1, first moment)."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def plot_runs(runs: Sequence[Path], output: Path) -> Path:
    """Draw training and validation loss, gradient norm and learning rate of one or several runs into a PNG.

    Where a run has its validation loss by noise level at two steps or more, that stands below, a panel a run.

    Raises:
        DataError: a run without a log or without a finished step, or an output that cannot be written.
    """
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise DataError(f"{output}: is a folder or lies in none; name a file in a folder that exists")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = [read_metrics(find_log(run)) for run in runs]
    levels = [by_level(events) for events in logs]
    shown = [number for number, lines in enumerate(levels) if any(len(steps) > 1 for steps, _ in lines)]
    figure = plt.figure(figsize=(8, 8 + 2.7 * bool(shown)), layout="constrained")
    above, *below = figure.subfigures(1 + bool(shown), 1, height_ratios=[8, 2.7][: 1 + bool(shown)], squeeze=False)[
        :, 0
    ]
    top, middle, bottom = above.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    for number, (run, events) in enumerate(zip(runs, logs, strict=True)):
        train = [e for e in events if e["event"] == "train" and math.isfinite(e.get("loss", math.nan))]
        if not train:
            raise DataError(f"{run}: the log has no finished step to plot yet")
        label = "" if len(runs) == 1 else f" {run.resolve().name}"
        validation = [event for event in events if event["event"] == "validation" and "loss" in event]
        _draw(top, middle, bottom, train, validation, number, label)
    if shown:
        panels = below[0].subplots(1, len(shown), sharey=True, squeeze=False)[0]
        _draw_levels(panels, [levels[number] for number in shown])
        for panel, number in zip(panels, shown, strict=True):
            panel.set_title("" if len(runs) == 1 else runs[number].resolve().name, fontsize=9)
        panels[0].set_ylabel("validation loss\nby noise level (nats)")
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False)
    middle.set_ylabel("gradient norm")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        with part_of(output) as part:
            figure.savefig(part, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        plt.close(figure)
    return output


def by_level(events: Sequence[Mapping[str, Any]]) -> list[tuple[list[float], list[float]]]:
    """Return steps and validation losses of each fifth of the noise levels, empty where none was measured."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in LEVELS]
    for event in events:
        if event["event"] != "validation" or not event.get("loss_by_noise_level"):
            continue
        for (steps, losses), value in zip(found, event["loss_by_noise_level"], strict=True):
            if value is not None and math.isfinite(value):
                steps.append(float(event["step"]))
                losses.append(float(value))
    return found


def _draw_levels(panels: Sequence[Any], runs: Sequence[Sequence[tuple[list[float], list[float]]]]) -> None:
    """Draw the five levels of each run into its panel, to one scale, each named at its end."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    values = [value for lines in runs for _, losses in lines for value in losses]
    curved = min(values) > 0 and max(values) > 8 * min(values)
    for axis, lines in zip(panels, runs, strict=True):
        for number, (steps, losses) in enumerate(lines):
            grey, marker = str(0.7 - 0.17 * number), "os^Dv"[number]
            axis.plot(steps, losses, color=grey, marker=marker, markersize=3.5, linewidth=1.2)
        if curved:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    bend, back = (math.log, math.exp) if curved else (float, float)
    low, high = map(bend, panels[0].get_ylim())
    for axis, lines in zip(panels, runs, strict=True):
        ends = sorted((losses[-1], steps, name) for (steps, losses), name in zip(lines, LEVELS, strict=True) if steps)
        last = -math.inf
        for loss, steps, name in ends:
            last = max(bend(loss), last + (high - low) / 15)  # names that would touch are moved apart
            axis.text(steps[-1] + 0.03 * (steps[-1] - steps[0]), back(last), name, fontsize=8, va="center")


def _draw(
    top: Any, middle: Any, bottom: Any, train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]],
    number: int, label: str,
) -> None:  # fmt: skip
    colour, style = f"C{number}", _STYLES[number % len(_STYLES)]
    steps, losses = [e["step"] for e in train], [e["loss"] for e in train]
    top.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    top.plot(steps, smooth(losses), style, color=colour, label=f"train{label} (smoothed)")
    if validation:
        points = [e["step"] for e in validation], [e["loss"] for e in validation]
        top.plot(*points, style, color=colour, marker="o", markersize=4, markerfacecolor="white",
                 label=f"validation{label}")  # fmt: skip
    middle.plot(steps, [e.get("grad_norm", math.nan) for e in train], style, color=colour, linewidth=0.8)
    bottom.plot(steps, [e.get("lr", math.nan) for e in train], style, color=colour)
