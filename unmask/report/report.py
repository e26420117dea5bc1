"""`unmask report`: several runs side by side on one page, from what their directories hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import yaml

from unmask.errors import DataError
from unmask.places import part_of
from unmask.report.chart import Line, line_chart
from unmask.report.page import answer, folded, page, table
from unmask.report.plots import LEVELS, by_level, smooth
from unmask.report.runs import Event, Points, Result, Run, differing, find_results, flat, read_runs

Draw = Callable[..., str]  # `line_chart` with the x axis that all charts share
_NOT_COMPARED = ("checkpoint.checkpoint_dir",)  # differs in every run and says nothing


def write_report(folders: Sequence[Path], output: Path, evaluations: Sequence[Path] = ()) -> Path:
    """Write a report of runs into one HTML file.

    Args:
        folders: run directories.
        output: the file.
        evaluations: folders that `unmask eval --output` wrote, beside those inside the run directories.

    Raises:
        DataError: a run without a log or without a finished step, an evaluation that cannot be read, or an output that
            cannot be written.
    """
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise DataError(f"{output}: is a folder or lies in none; name a file in a folder that exists")
    runs = read_runs(folders)
    text = report(runs, find_results([run.folder for run in runs], evaluations))
    try:
        with part_of(output) as part:
            part.write_text(text, "utf-8", errors="replace")  # half a surrogate pair, which JSON may hold, is no text
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another place") from None
    return output


def report(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """Return the page's HTML."""
    names = ", ".join(run.name for run in runs)
    title = f"Training run {names}" if len(runs) == 1 else f"{len(runs)} training runs"
    folders = " · ".join(str(run.folder) for run in runs)
    return page(
        title,
        folders,
        [
            ("Summary", table(["", *(run.name for run in runs)], _summary(runs), numbers=True)),
            ("What differs", _differences(runs)),
            ("Curves", _charts(runs)),
            ("Evaluation", _evaluation(results)),
            ("Sample answers", "".join(_samples(run, number) for number, run in enumerate(runs))),
            ("Environment", table(["", *(run.name for run in runs)], _environment(runs))),
            ("Details", _details(runs)),
        ],
    )


def _summary(runs: Sequence[Run]) -> list[list[str]]:
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{run.of('train')[-1]['step']:,}{_how_it_ended(run)}" for run in runs]),
        ("training loss, smoothed", [_number(_smoothed(run.points("train", "loss")[1])[-1]) for run in runs]),
        ("validation loss, first", [_first(run.points("validation", "loss")) for run in runs]),
        ("validation loss, last", [_last(run.points("validation", "loss")) for run in runs]),
        ("validation loss, least", [_extreme(run.points("validation", "loss"), min) for run in runs]),
        ("exact match, first", [_first(run.exact_match(), percent) for run in runs]),
        ("exact match, last", [_last(run.exact_match(), percent) for run in runs]),
        ("exact match, best", [_extreme(run.exact_match(), max, percent) for run in runs]),
        ("best checkpoint", [_best(run) for run in runs]),
        ("parameters", [_count(run.start().get("parameters")) for run in runs]),
        ("of them trained", [_count(run.start().get("trainable_parameters")) for run in runs]),
        ("training rows", [_count(run.start().get("rows")) for run in runs]),
        ("tokens seen", [_count(sum(run.points("train", "tokens")[1]) or None) for run in runs]),
        ("tokens per second, median", [_count(_median(run.points("train", "tokens_per_second")[1])) for run in runs]),
        ("MFU, median", [_mfu(run) for run in runs]),
        ("peak memory", [_extreme(run.points("train", "memory_gib"), max, _gib, place=False) for run in runs]),
        ("time, first to last step", [_duration(run) for run in runs]),
    ]
    return [[name, *values] for name, values in rows if any(values)]


def _mfu(run: Run) -> str:
    share = _median(run.points("train", "mfu")[1])
    return "" if share is None else percent(share)


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    rows = differing([run.config for run in runs])
    kept = [[key, *map(_shown, values)] for key, values in rows.items() if key not in _NOT_COMPARED]
    if not kept:
        return "<p>The configurations are the same but for the run directory.</p>"
    return table(["field", *(run.name for run in runs)], kept)


def _charts(runs: Sequence[Run]) -> str:
    ends = [event["step"] for run in runs for event in run.events if event["event"] in ("train", "validation")]
    draw = partial(line_chart, steps=(min(ends), max(ends)))
    answered = _lines(runs, [run.exact_match() for run in runs], markers=True)
    charts = [
        draw("Training loss", _trained(runs, "loss"), _unit(runs), log=True),
        *_term_charts(runs, draw),
        draw("Validation loss", _per_run(runs, "validation", "loss", markers=True), _unit(runs), log=True),
        *_level_charts(runs, draw),
        draw("Exact match", answered, "share of right answers", percent, bounds=(0.0, 1.0)),
        draw("Gradient norm", _trained(runs, "grad_norm"), "before clipping", log=True),
        draw("Learning rate", _per_run(runs, "train", "lr")),
        draw("Speed", _trained(runs, "tokens_per_second"), "tokens per second"),
        draw("Peak memory", _per_run(runs, "train", "memory_gib"), "GiB"),
    ]
    drawn = "".join(charts)
    faint = '<p class="soft">Pale lines are single steps, strong ones their moving average.</p>'
    return f'{faint}<div class="charts">{drawn}</div>'


def _term_charts(runs: Sequence[Run], draw: Draw) -> list[str]:
    terms = list(dict.fromkeys(term for run in runs if len(run.terms()) > 1 for term in run.terms()))
    if len(runs) > 1:
        return [
            draw(f"Training loss: {_term(term)}", _trained(runs, term), "nats per token", log=True) for term in terms
        ]
    lines = []
    for style, term in enumerate(terms):
        xs, ys = runs[0].points("train", term)
        lines.append(Line(_term(term), xs, _smoothed(ys), style))
    return [draw("Training loss by term", lines, "nats per token", log=True)]


def _level_charts(runs: Sequence[Run], draw: Draw) -> list[str]:
    """Draw a chart of the five levels for each run that has them, all to the same scale."""
    found = {run.name: by_level(run.events) for run in runs}
    values = [y for lines in found.values() for _, ys in lines for y in ys]
    if not values:
        return []
    bounds = (min(values), max(values)) if max(values) > min(values) else None
    charts = []
    for run in runs:
        lines = [
            Line(share, xs, ys, style, markers=True)
            for style, (share, (xs, ys)) in enumerate(zip(LEVELS, found[run.name], strict=True))
        ]
        of = f", {run.name}" if len(runs) > 1 else ""
        charts.append(draw(f"Validation by noise level{of}", lines, "nats per scored token", bounds=bounds, log=True))
    return charts


def _trained(runs: Sequence[Run], field: str) -> list[Line]:
    lines = []
    for style, run in enumerate(runs):
        xs, ys = run.points("train", field)
        name = run.name if len(runs) > 1 else ""
        lines += [Line("", xs, ys, style, faint=True), Line(name, xs, _smoothed(ys), style)]
    return lines


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return a moving average over about a fortieth of the run: two steps at least, twenty at most."""
    return smooth(values, min(0.95, max(0.5, 1 - 40 / max(1, len(values)))))


def _per_run(runs: Sequence[Run], kind: str, field: str, markers: bool = False) -> list[Line]:
    return _lines(runs, [run.points(kind, field) for run in runs], markers)


def _lines(runs: Sequence[Run], points: Sequence[Points], markers: bool = False) -> list[Line]:
    named = len(runs) > 1
    pairs = zip(runs, points, strict=True)
    return [Line(run.name if named else "", *found, style, markers=markers) for style, (run, found) in enumerate(pairs)]


def _evaluation(results: Sequence[Result]) -> str:
    """Show what was measured, models next to each other in each task; columns that nothing fills are left out."""
    names = ["task", "of", "measured", "value", "95 % interval", "n", "compared"]
    order = list(dict.fromkeys((result.task, result.measure) for result in results))
    together = sorted(results, key=lambda result: order.index((result.task, result.measure)))
    rows = [result.cells() for result in together]
    filled = [column for column in range(len(names)) if any(row[column] for row in rows)]
    measured = table([names[column] for column in filled], [[row[column] for column in filled] for row in rows])
    return measured + _settings(together)


def _settings(results: Sequence[Result]) -> str:
    """Say how each task was measured: once, or once for the models that differ in it."""
    models: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.settings:
            models.setdefault((result.task, result.settings), []).append(result.of)
    tasks = [task for task, _ in models]
    paragraphs = []
    for (task, settings), of in models.items():
        whose = "" if tasks.count(task) == 1 else f" of {', '.join(dict.fromkeys(of))}"
        paragraphs.append(f'<p class="soft">{escape(f"{task}{whose}: {settings}")}</p>')
    return "".join(paragraphs)


def _samples(run: Run, number: int) -> str:
    """Show the answers to each kept row, the last one whole and those of earlier steps folded."""
    by_row: dict[str, list[Any]] = {}
    for sample in run.samples:
        by_row.setdefault(sample.get("row", ""), []).append(sample)
    parts = [f"<h3>{escape(run.name)}</h3>"] if by_row else []
    for place, samples in enumerate(by_row.values()):
        last = samples[-1]
        earlier = table(["step", "answer", ""], [[s["step"], s["text"], _mark(s)] for s in samples[:-1]])
        parts.append(
            f'<div class="sample"><p>{escape(last["prompt"])}</p>'
            f'<p class="soft">step {last["step"]}: {_mark(last)}</p>'
            + answer(last["text"], last.get("frames", []), f"frames-{number}-{place}")
            + folded("wanted", f"<pre>{escape(last['reference'])}</pre>")
            + folded("answers at earlier steps", earlier)
            + "</div>"
        )
    return "".join(parts)


def _environment(runs: Sequence[Run]) -> list[list[str]]:
    found = [{**run.start().get("environment", {}), **run.start().get("versions", {})} for run in runs]
    keys = dict.fromkeys(key for values in found for key in values)
    return [[key, *(_shown(values.get(key)) for values in found)] for key in keys]


def _details(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        events = [e for e in run.of("validation") if "loss" in e]
        rows = [
            [e["step"], _number(e["loss"]), *(_number(v) for v in e.get("loss_by_noise_level") or [None] * 5)]
            for e in events
        ]
        head = ["step", "loss", *(f"noise {share}" for share in LEVELS)]
        parts.append(folded(f"validation numbers of {run.name}", table(head, rows, numbers=True)))
        if run.config:
            text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
            parts.append(folded(f"configuration of {run.name}", f"<pre>{escape(text)}</pre>"))
    return "".join(parts)


def percent(value: float) -> str:
    """Return a share as per cent."""
    return f"{100 * value:.1f} %".replace(".0 %", " %")


def _unit(runs: Sequence[Run]) -> str:
    kinds = [flat(run.config).get("dllm.normalization") for run in runs]
    return "nats per token" if "sequence" not in kinds else "nats per token, mean over rows"


def _term(field: str) -> str:
    return field.removesuffix("_loss").replace("_", " ")


def _mark(sample: Any) -> str:
    return "right" if sample.get("correct") else "wrong"


def _how_it_ended(run: Run) -> str:
    # What ended before the run went on is not how it ended.
    ends = [event for event in _stretches(run)[-1] if event["event"] == "end"]
    total = run.start().get("total_steps")
    if ends and ends[-1]["reason"] != "finished":
        return f", {ends[-1]['reason']}"
    return "" if ends or total is None else f" of {total:,}, not ended"


def _stretches(run: Run) -> list[list[Event]]:
    """Return the events of each time that a run was started or resumed; one stretch where nothing says so."""
    stretches: list[list[Event]] = [[]]
    for event in run.events:
        if event["event"] == "run" and stretches[-1]:
            stretches.append([])
        stretches[-1].append(event)
    return stretches


def _best(run: Run) -> str:
    found = run.of("best")
    return f"{found[-1]['metric']} {_number(found[-1]['value'])} (step {found[-1]['step']})" if found else ""


def _first(points: Points, show: Any = None) -> str:
    return _at(points, 0, show) if len(points[0]) > 1 else ""


def _last(points: Points, show: Any = None) -> str:
    return _at(points, -1, show)


def _at(points: Points, place: int, show: Any = None) -> str:
    xs, ys = points
    return f"{(show or _number)(ys[place])} (step {xs[place]:g})" if xs else ""


def _extreme(points: Points, which: Any, show: Any = None, place: bool = True) -> str:
    xs, ys = points
    if len(xs) < 2:
        return ""
    found = which(ys)
    return (show or _number)(found) + (f" (step {xs[ys.index(found)]:g})" if place else "")


def _duration(run: Run) -> str:
    """Return the time from the first to the last step of each stretch, together: what lies between them is no work."""
    times = [[e["time"] for e in part if e["event"] == "train" and "time" in e] for part in _stretches(run)]
    if max(map(len, times)) < 2:
        return ""
    minutes, seconds = divmod(int(sum(part[-1] - part[0] for part in times if part)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _gib(value: float) -> str:
    return f"{value:.2f} GiB"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "—"}[value]
    return str(value)
