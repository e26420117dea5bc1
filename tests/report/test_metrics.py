"""The log of a run: one object a line, cut and read back whatever happened to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.errors import DataError
from unmask.report.metrics import MetricsLog, cut_after, read_metrics


def test_events_are_appended_and_passed_on(tmp_path: Path) -> None:
    path, heard, closed = tmp_path / "metrics.jsonl", [], []
    for step in (1, 2):
        log = MetricsLog(path, [heard.append], [lambda: closed.append(True)])
        log.write("train", step=step, loss=0.5)
        log.close()
    events = read_metrics(path)
    assert [event["step"] for event in events] == [1, 2] and events == heard and closed == [True, True]
    assert all(set(event) == {"event", "step", "loss", "time"} for event in events)


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    log.write("train", step=1)
    assert len(read_metrics(tmp_path / "m")) == 1
    log.close()


def test_a_torn_last_line_is_left_out_and_an_earlier_one_refused(tmp_path: Path) -> None:
    path, line = tmp_path / "m", json.dumps({"event": "train", "step": 1})
    path.write_text(line + '\n{"event": "tr')
    assert len(read_metrics(path)) == 1
    for damaged in ('{"event": "tr', "3", "{}"):
        path.write_text(f"{line}\n{damaged}\n{line}\n")
        with pytest.raises(DataError, match=":2: "):
            read_metrics(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "nowhere")


def test_cutting_keeps_what_a_checkpoint_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "m"
    cut_after(path, 3)
    assert not path.exists()
    events = [{"event": "run"}, *({"event": "train", "step": step} for step in range(1, 6))]
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')
    cut_after(path, 3)
    assert read_metrics(path) == events[:4]
    cut_after(path, -1)
    assert read_metrics(path) == [] and [p.name for p in tmp_path.iterdir()] == ["m"]
