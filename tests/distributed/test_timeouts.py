"""How long ranks wait for each other: as the user says for a silent one, and as long as it takes for one at work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import main
from unmask.distributed.ranks import _PATIENCE


@pytest.mark.parametrize("experts", [1, 2])
def test_every_group_waits_as_long_as_the_user_says(run_ranks, experts: int) -> None:
    """The default group, the meshes' and the saver's; those of `gather_results` alone are patient."""
    for found in run_ranks(4, "timeouts", experts):
        patient = {name for name in found if name.startswith("patient ")}
        assert len(patient) == 2 and {found[name] for name in patient} == {_PATIENCE.total_seconds()}
        assert {seconds for name, seconds in found.items() if name not in patient} == {7 * 60}
        # The default group, the saver's, and one for each axis of the meshes.
        assert len(found) - len(patient) == 2 + 2 + (3 if experts > 1 else 0)


def test_a_group_that_waits_for_work_does_not_wait_for_its_members(run_ranks) -> None:
    began = time.monotonic()
    assert run_ranks(2, "meet_alone", 1.0) == ["DistStoreError", ""]
    assert time.monotonic() - began < 60


def test_a_run_makes_no_group_of_another_timeout(run_ranks, tiny, tmp_path: Path) -> None:
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1, distributed={"timeout_minutes": 7})
    for found in run_ranks(2, "train_and_wait", values):
        assert found == {7 * 60, _PATIENCE.total_seconds()}


def words(tiny: Any, tiny_base: Path, tmp_path: Path, command: str) -> list[str]:
    flags = ["--checkpoint", str(tiny_base), "--max_new_tokens", "4", "--device", "cpu"]
    if command == "eval":
        return ["eval", *flags, "--tasks", "text", "--data", str(tiny.folder / "train.jsonl"), "--limit", "4",
                "--output", str(tmp_path / "out")]  # fmt: skip
    return ["generate", *flags, "--prompt", "1 plus 1?", "--prompt", "so?", "--output", str(tmp_path / "out.jsonl")]


@pytest.mark.parametrize("command", ["generate", pytest.param("eval", marks=pytest.mark.slow)])
def test_a_rank_that_is_done_waits_for_one_that_is_slower_than_the_timeout(
    run_ranks, tiny, tiny_base: Path, tmp_path: Path, command: str
) -> None:
    given = words(tiny, tiny_base, tmp_path, command)
    assert run_ranks(2, "command_with_slow_rank", given, 2.5, "well") == [0, 0]


def test_a_rank_that_waits_notices_a_death(start_ranks, tiny, tiny_base: Path, tmp_path: Path) -> None:
    given = words(tiny, tiny_base, tmp_path, "generate")
    began = time.monotonic()
    processes = start_ranks(tmp_path / "notes", 2, "command_with_slow_rank", given, 0.5, "killed")
    for process in processes:
        process.join(60)
    assert time.monotonic() - began < 35 and processes[0].exitcode == 0
    assert (tmp_path / "notes" / "rank0.err").read_text().count("another rank died") == 1


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "1e9", "soon"])
def test_a_timeout_that_is_none_is_refused(tiny_base: Path, capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    assert main(["generate", "--checkpoint", str(tiny_base), "--prompt", "so?", f"--timeout_minutes={minutes}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "timeout_minutes" in said
