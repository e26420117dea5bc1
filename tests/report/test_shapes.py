"""Law: whatever JSON stands in the files of a run or an evaluation, plot and report draw it or name the file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report import write_results, write_run
from unmask.errors import DataError
from unmask.report import report as report_module
from unmask.report.plots import plot_runs
from unmask.report.report import write_report

VALUES: list[Any] = [
    None, True, 0, -1, 10**400, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), "", "5", "x" * 500, "\ud800",
    [], [1], [[]], ["a"], {}, {"a": 1}, [None] * 5, [{}], [{"nfe": 1, "text": 2}] * 3,
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside a JSON value, its own first."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def mutated(value: Any, draw: random.Random) -> Any:
    """Return a copy with another value in one place, or without one."""
    value = copy.deepcopy(value)
    path = draw.choice(list(places(value)))
    if not path:
        return draw.choice(VALUES)
    *way, last = path
    inside = value
    for key in way:
        inside = inside[key]
    if draw.random() < 0.2:
        del inside[last]
    else:
        inside[last] = draw.choice(VALUES)
    return value


def is_drawn_or_refused(call: Callable[[], object], root: Path) -> bool:
    """Say that a file was refused in one line that names a place in `root`, or drawn."""
    try:
        call()
    except DataError as error:
        assert str(root) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return False
    return True


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.mark.parametrize(
    ("file", "number", "change"),
    [
        ("metrics.jsonl", 0, {"environment": [1]}),
        ("metrics.jsonl", 0, {"total_steps": "x"}),
        ("metrics.jsonl", 1, {"step": "1"}),
        ("metrics.jsonl", 1, {"loss": [1.0]}),
        ("metrics.jsonl", 1, {"loss": 10**400}),
        ("metrics.jsonl", 1, {"step": float("nan")}),
        ("metrics.jsonl", 1, {"time": float("inf")}),
        ("metrics.jsonl", 1, {"event": []}),
        ("metrics.jsonl", 11, {"loss_by_noise_level": 5}),
        ("metrics.jsonl", 11, {"loss_by_noise_level": [1.0]}),
        ("metrics.jsonl", -1, {"reason": 3}),
        ("metrics.jsonl", -2, {"value": "x"}),
        ("samples.jsonl", 0, {"prompt": 3}),
        ("samples.jsonl", 0, {"frames": [1, 2]}),
        ("samples.jsonl", 0, {"row": []}),
    ],
)
def test_an_event_of_another_shape_is_refused_by_file_and_line(
    tmp_path: Path, file: str, number: int, change: dict
) -> None:
    root = write_run(tmp_path / "run", steps=12)
    events = lines_of(root / file)
    events[number].update(change)
    write(root / file, events)
    place = f"{file}:{number % len(events) + 1}: "
    with pytest.raises(DataError, match=place):
        write_report([root], tmp_path / "r.html")
    if file == "metrics.jsonl":
        with pytest.raises(DataError, match=place):
            plot_runs([root], tmp_path / "p.png")


def test_what_is_not_finite_or_missing_is_left_out(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=12)
    events = lines_of(root / "metrics.jsonl")
    events[3].update(loss=float("nan"), grad_norm=float("inf"))
    del events[4]["lr"], events[5]["loss"]
    events[11]["loss_by_noise_level"][0] = float("nan")
    write(root / "metrics.jsonl", events)
    write(root / "samples.jsonl", [{**lines_of(root / "samples.jsonl")[0], "text": "half \ud800"}])
    assert "half ?" in write_report([root], tmp_path / "r.html").read_text("utf-8")
    assert plot_runs([root], tmp_path / "p.png").is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"total": "many"},
        {"settings": 5},
        {"low": []},
        {"exact_match": "half"},
        {"exact_match": 10**400},
        {"compared": {"first": 1}},
    ],
)
def test_a_result_of_another_shape_is_refused_by_name(tmp_path: Path, change: dict) -> None:
    root = write_run(tmp_path / "run", steps=2)
    file = write_results(root / "eval") / "results.json"
    values = json.loads(file.read_text())
    values["results"][0].update(change)
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"results\.json"):
        write_report([root], tmp_path / "r.html")


def fuzz(tmp_path: Path, count: int) -> tuple[int, int]:
    """Change one value in one file `count` times; return how often a file was drawn, and how often refused."""
    root = write_run(tmp_path / "run", steps=12, terms=True)
    write_results(root / "eval")
    files = {name: (root / name).read_text() for name in ("metrics.jsonl", "samples.jsonl", "eval/results.json")}
    draw, drawn = random.Random(0), 0
    for _ in range(count):
        name = draw.choice(list(files))
        values = [json.loads(line) for line in files[name].splitlines()]
        number = draw.randrange(len(values))
        values[number] = mutated(values[number], draw)
        write(root / name, [*values, values[0]])
        if name.endswith("results.json"):
            (root / name).write_text(json.dumps(values[0]))
        drawn += is_drawn_or_refused(lambda: write_report([root], tmp_path / "r.html"), root)
        if name == "metrics.jsonl":
            is_drawn_or_refused(lambda: plot_runs([root], tmp_path / "p.png"), root)
        (root / name).write_text(files[name])
    return drawn, count - drawn


def test_mutated_files_are_drawn_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "line_chart", lambda *_, **__: "")
    monkeypatch.setattr("tests.report.test_shapes.plot_runs", lambda *_: None)
    assert min(fuzz(tmp_path, 400)) > 50


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mutated_files_are_drawn_or_refused_with_their_charts(tmp_path: Path) -> None:
    assert min(fuzz(tmp_path, 150)) > 20
