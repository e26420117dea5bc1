"""Ranks that share a model measure what one does, keep the best checkpoint, and answer their own rows in step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.report.metrics import read_metrics

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`

Train = Callable[..., Any]


@pytest.mark.slow
def test_two_ranks_measure_and_keep_what_one_does(tiny, train_tiny: Train, run_ranks, tmp_path: Path) -> None:
    def config(root: Path) -> dict:
        return tiny.config(
            root,
            step_scheduler__max_steps=4,
            step_scheduler__val_every_steps=1,
            validation_dataset=tiny.validation(),
            validation={"generate_every_steps": 2, "max_samples": 3, "keep_samples": 1,
                        "sampler": {"steps": 3, "max_new_tokens": 12, "block_size": 12}},
            optimizer__lr=0.05,  # so large that the loss does not fall at every step
            checkpoint__best_metric="validation_loss",
            checkpoint__max_recent_checkpoints=1,
        )  # fmt: skip

    alone = train_tiny({**config(tmp_path / "alone"), "step_scheduler": {
        **config(tmp_path)["step_scheduler"], "local_batch_size": 2}})  # fmt: skip
    assert run_ranks(2, "train", config(tmp_path / "shared")) == ["finished", "finished"]
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("shared", "alone"))
    for one, other in zip(of(ours, "validation"), of(theirs, "validation"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        for mine, yours in zip(one["loss_by_noise_level"], other["loss_by_noise_level"], strict=True):
            assert mine == pytest.approx(yours, rel=1e-3)
    assert [(e["step"], e["total"]) for e in of(ours, "exact_match")] == [(2, 3), (4, 3)]
    assert [e["step"] for e in of(ours, "best")] == [e["step"] for e in of(theirs, "best")]
    assert os.readlink(tmp_path / "shared" / "best") == f"step_{alone.outcome.best.step}"
    kept = {path.name for path in (tmp_path / "shared").glob("step_*")}
    assert kept == {"step_4", f"step_{alone.outcome.best.step}"}
    samples = [json.loads(line) for line in (tmp_path / "shared" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 4] and len(samples[0]["frames"]) >= 1


@pytest.mark.slow
def test_fewer_validation_rows_than_ranks(tiny, train_tiny: Train, run_ranks, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text((tiny.folder / "valid.jsonl").read_text().splitlines(keepends=True)[0])

    def config(name: str) -> dict:
        return tiny.config(
            tmp_path / name,
            step_scheduler__max_steps=2,
            step_scheduler__val_every_steps=1,
            validation_dataset=tiny.validation(path_or_dataset_id=str(tmp_path / "one.jsonl")),
            validation={"generate_every_steps": 1, "sampler": {"steps": 3, "max_new_tokens": 12, "block_size": 12}},
        )

    train_tiny(config("alone"))
    assert run_ranks(2, "train", config("shared")) == ["finished", "finished"]
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("shared", "alone"))
    for kind in ("validation", "exact_match"):
        assert len(of(ours, kind)) == len(of(theirs, kind)) > 0
    for one, other in zip(of(ours, "validation"), of(theirs, "validation"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert [e["total"] for e in of(ours, "exact_match")] == [e["total"] for e in of(theirs, "exact_match")]


def of(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]
