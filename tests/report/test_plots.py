"""Loss curves come from runs' logs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.cli import main
from unmask.errors import DataError
from unmask.report.plots import find_log, plot_runs, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(root: Path, steps: int = 5) -> Path:
    root.mkdir()
    events: list[dict] = [{"event": "run"}]
    events += [{"event": "train", "step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 1e-3} for s in range(1, steps + 1)]
    events += [{"event": "validation", "step": steps, "loss": 0.4}] if steps else []
    (root / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return root


def test_one_run_and_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert main(["plot", str(one)]) == 0
    assert (one / "loss.png").read_bytes().startswith(PNG)
    assert main(["plot", str(one), str(two), "--output", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes() != (one / "loss.png").read_bytes()
    assert capsys.readouterr().out.count("wrote ") == 2
    assert not list(tmp_path.rglob("*.part"))


def test_a_checkpoint_stands_for_its_run(tmp_path: Path) -> None:
    (write_run(tmp_path / "one") / "step_5").mkdir()
    assert find_log(tmp_path / "one" / "step_5") == tmp_path / "one" / "metrics.jsonl"


def test_a_run_without_anything_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no metrics\.jsonl"):
        find_log(tmp_path / "nowhere")
    empty = write_run(tmp_path / "empty", steps=0)
    with pytest.raises(DataError, match=r"no metrics\.jsonl here; did you mean .*/empty\?$"):
        find_log(tmp_path)
    with pytest.raises(DataError, match="no finished step"):
        plot_runs([empty], empty / "loss.png")
    assert not (empty / "loss.png").exists()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_smoothing_stays_within_the_values_and_starts_at_the_first(values: list[float]) -> None:
    smoothed = smooth(values)
    assert smoothed[0] == pytest.approx(values[0], abs=1e-9)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in smoothed)


def test_smoothing_is_the_bias_corrected_mean() -> None:
    assert smooth([1.0, 2.0], 0.5) == pytest.approx([1.0, 5 / 3])


def test_validation_by_noise_level_stands_below(tmp_path: Path) -> None:
    from unmask.report.plots import by_level

    plain, levelled = write_run(tmp_path / "plain"), write_run(tmp_path / "levelled")
    events = [
        {"event": "validation", "step": step, "loss": 1.0, "loss_by_noise_level": [0.1 / step, None, 1.0, 2.0, 3.0]}
        for step in (2, 4)
    ]
    with (levelled / "metrics.jsonl").open("a") as log:
        log.write("".join(json.dumps(event) + "\n" for event in events))
    assert by_level(events) == [([2, 4], [0.05, 0.025]), ([], []), *[([2, 4], [n, n]) for n in (1.0, 2.0, 3.0)]]
    heights = []
    for runs in ([plain], [levelled], [plain, levelled], [levelled, levelled]):
        drawn = plot_runs(runs, tmp_path / "out.png").read_bytes()
        heights.append(int.from_bytes(drawn[20:24], "big"))
    assert heights[0] < heights[1] == heights[2] == heights[3]
