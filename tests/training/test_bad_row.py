"""Law: a row that cannot be trained on loses nothing. What was trained on must stay as it was, the rest may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask import assemble
from unmask.data.check import Checked
from unmask.errors import CheckpointError, DataError
from unmask.training.checkpoint import checkpoints, verify

Train = Callable[..., Any]
ALTERNATING = "reports/alternating.jinja"


def row(answer: str, *questions: str) -> dict:
    turns = [{"role": "user", "content": question} for question in questions or ("q?",)]
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}


class Place:
    """Rows in a file, one of which the template refuses until it is mended, and a run over them.

    Attributes:
        bad: line of that row, from 1, which the fifth of eight steps of four rows reaches.
    """

    bad = 18

    def __init__(self, tiny, folder: Path, fixtures: Path, **changes: object) -> None:
        self.path, self.root = folder / "rows.jsonl", folder / "run"
        self.rows = [row(f"answer {number}") for number in range(32)]
        self.rows[self.bad - 1] = row("late", "one", "two")
        self.write()
        settings = {
            "dataset__path_or_dataset_id": str(self.path), "dataset__chat_template": str(fixtures / ALTERNATING),
            "dataloader__shuffle": False, "step_scheduler__max_steps": 8,
        }  # fmt: skip
        self.values = tiny.config(self.root, **{**settings, **changes})

    def write(self) -> None:
        self.path.write_text("".join(json.dumps(each) + "\n" for each in self.rows))

    def mend(self, answer: str = "late") -> None:
        self.rows[self.bad - 1] = row(answer)
        self.write()

    def accepting(self, **checkpoint: object) -> dict:
        return {**self.values, "checkpoint": {**self.values["checkpoint"], "accept_changed_data": True, **checkpoint}}


@pytest.fixture
def place(tiny, tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """Return a function that makes a place whose rows are too many to check them all before the first step."""
    sample = Checked(1, 32, 600.0, {}, {}, {})
    monkeypatch.setattr(assemble, "check_rows", lambda *arguments: sample)
    return lambda **changes: Place(tiny, tmp_path, fixtures, **changes)


def test_a_row_that_only_the_template_refuses_is_named_before_the_first_step(tiny, train_tiny, tmp_path, fixtures):
    there = Place(tiny, tmp_path, fixtures)
    with pytest.raises(DataError, match="rows.jsonl:18: .*roles must alternate.*fix the row or set dataset.on_malf"):
        train_tiny(there.values)
    assert not checkpoints(there.root) and not (there.root / "metrics.jsonl").exists()
    there.mend()
    run = train_tiny({**there.values, "step_scheduler": {**there.values["step_scheduler"], "max_steps": 2}})
    assert "checked: all 32 rows rendered and tokenised" in run.output
    resumed = train_tiny(there.values)
    assert "checked:" not in resumed.output
    assert [event["checked_rows"] for event in resumed.events if event["event"] == "run"] == [32, None]


def stopped_at(train: Train, place: Place) -> str:
    with pytest.raises(DataError) as caught:
        train(place.values)
    said = str(caught.value)
    assert caught.value.exit_status == 2 and "\n" not in said
    assert f"rows.jsonl:{place.bad}: " in said and "roles must alternate" in said
    return said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step_scheduler__ckpt_every_steps": 2},
        {"step_scheduler__ckpt_every_steps": 4},
        {"dataloader__group_by_length": True},
    ],
    ids=["no checkpoint yet", "one in between", "one just saved", "grouped"],
)
def test_a_bad_row_in_mid_run_loses_nothing(place, train_tiny: Train, tmp_path: Path, changes: dict) -> None:
    there = place(**changes)
    said = stopped_at(train_tiny, there)
    newest = checkpoints(there.root)[0]
    made = int(newest.name.removeprefix("step_"))
    assert made == 4 or "dataloader__group_by_length" in changes
    assert said.endswith(f". Step {made} is saved in {newest}: the same command goes on from there")
    verify(newest)
    there.mend()
    resumed = train_tiny(there.values)
    assert "checked: 1 of 32 rows" in resumed.output  # again, as the data are others
    assert f"resuming from {newest} after step {made} of 8" in resumed.output
    assert f"changed since step {made}: the data, but none of the rows trained on so far" in resumed.output
    assert list(resumed.losses) == list(range(1, 9))
    if "dataloader__group_by_length" not in changes:  # where the mended row's length changes the order
        whole = train_tiny({**there.values, "checkpoint": {"checkpoint_dir": str(tmp_path / "whole")}})
        assert whole.losses == resumed.losses


@pytest.mark.timeout(60)
def test_a_bad_row_that_a_worker_reads_loses_nothing(place, train_tiny: Train) -> None:
    there = place(dataloader__num_workers=1, step_scheduler__ckpt_every_steps=1)
    stopped_at(train_tiny, there)
    made = int(checkpoints(there.root)[0].name.removeprefix("step_"))
    assert 0 < made <= 4  # rows are sent to workers in groups, and the groups before the bad one are trained on
    there.mend()
    assert list(train_tiny({**there.values, "dataloader": {"shuffle": False}}).losses) == list(range(1, 9))


def test_a_bad_row_before_any_step_saves_nothing(place, train_tiny: Train) -> None:
    there = place()
    there.rows[0], there.rows[there.bad - 1] = there.rows[there.bad - 1], there.rows[0]
    there.bad = 1
    there.write()
    assert stopped_at(train_tiny, there).endswith("No step was made yet")
    assert not checkpoints(there.root)


def test_without_checkpoints_it_is_said_that_nothing_was_saved(place, train_tiny: Train) -> None:
    said = stopped_at(train_tiny, place(checkpoint__enabled=False))
    assert said.endswith("Nothing was saved: checkpoint.enabled is false")


def test_the_row_may_be_skipped_instead(place, train_tiny: Train) -> None:
    there = place()
    stopped_at(train_tiny, there)
    run = train_tiny({**there.values, "dataset": {**there.values["dataset"], "on_malformed": "skip"}})
    assert run.outcome.step == 8 and f"left out 1 rows: malformed (first: {there.path}:18: " in run.output


def test_a_changed_row_makes_the_checkpoints_foreign_that_were_trained_on_it(place, train_tiny: Train) -> None:
    there = place(step_scheduler__ckpt_every_steps=2)
    stopped_at(train_tiny, there)
    there.rows[9] = row("another")  # of step 3
    there.mend()
    resumed = train_tiny(there.values)
    remedy = "put them back, or set checkpoint.accept_changed_data: true to go on with them as they are"
    assert f"refused: step_4 is foreign: rows that it was trained on are no longer the same; {remedy}" in resumed.output
    assert f"resuming from {there.root / 'step_2'} after step 2 of 8" in resumed.output


def test_changed_rows_that_were_trained_on_can_be_accepted(place, train_tiny: Train) -> None:
    there = place(step_scheduler__ckpt_every_steps=2)
    stopped_at(train_tiny, there)
    there.rows[0] = row("another")
    there.mend()
    with pytest.raises(CheckpointError, match="step_4 is foreign: .*step_2 is foreign: ") as caught:
        train_tiny(there.values)
    assert str(caught.value).count("accept_changed_data") == 1 and "\n" not in str(caught.value)
    accepted = {**there.values, "checkpoint": {**there.values["checkpoint"], "accept_changed_data": True}}
    accepted["step_scheduler"] = {**there.values["step_scheduler"], "max_steps": 6}
    run = train_tiny(accepted)
    note = "rows that were trained on; checkpoint.accept_changed_data goes on with them as they are"
    assert f"resuming from {there.root / 'step_4'}" in run.output and f"changed since step 4: {note}" in run.output
    assert [event["changed_data"] for event in run.events if event["event"] == "run"] == [None, note]
    # What was accepted is what counts from then on.
    there.rows[-1] = row("of the last step")
    there.write()
    assert f"resuming from {there.root / 'step_6'}" in train_tiny(there.values).output
