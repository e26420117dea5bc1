"""Loss curves from the run's own log. Lines differ in style as well as colour, so that a grey print still reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.report.metrics import FILE, read_metrics

_STYLES = ("-", "--", "-.", ":")


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

    Raises:
        DataError: a run without a log or without a finished step, or an output that cannot be written.
    """
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise DataError(f"{output}: is a folder or lies in none; name a file in a folder that exists")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    for number, run in enumerate(runs):
        events = read_metrics(find_log(run))
        train = [event for event in events if event["event"] == "train"]
        if not train:
            raise DataError(f"{run}: the log has no finished step to plot yet")
        label = "" if len(runs) == 1 else f" {run.resolve().name}"
        _draw(top, middle, bottom, train, [e for e in events if e["event"] == "validation"], number, label)
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False)
    middle.set_ylabel("gradient norm")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    temporary = output.with_name(output.name + ".part")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        plt.close(figure)
    return output


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
    middle.plot(steps, [e["grad_norm"] for e in train], style, color=colour, linewidth=0.8)
    bottom.plot(steps, [e["lr"] for e in train], style, color=colour)
