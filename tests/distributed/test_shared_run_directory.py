"""A run directory is one folder for all ranks: found out at the start, before a commit, and read by all at a resume."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from unmask.training import checkpoint
from unmask.training.checkpoint import begin_checkpoint, commit_checkpoint, list_files, verify, write_state

HOST = socket.gethostname()


def test_a_directory_that_a_rank_does_not_see_is_refused_at_the_start(start_ranks, tiny, tmp_path: Path) -> None:
    values = tiny.config("here/run", step_scheduler__max_steps=1, step_scheduler__global_batch_size=6)
    path = tiny.write(tmp_path / "run.yaml", values)
    processes = start_ranks(tmp_path / "notes", 3, "command_in_own_folder", ["train", "-c", str(path)], str(tmp_path))
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    said = "".join((tmp_path / "notes" / f"rank{rank}.err").read_text() for rank in range(3))
    errors = [line for line in said.splitlines() if "error" in line or "Traceback" in line]
    assert len(errors) == 1 and f"{tmp_path / 'machine0' / 'here' / 'run'}, where rank 0 on {HOST} trains" in errors[0]
    assert f"another folder for ranks 1, 2 on {HOST}; choose one on a file system that all machines share" in errors[0]
    assert not any(path.is_file() for rank in range(3) for path in (tmp_path / f"machine{rank}").rglob("*"))


def test_nothing_stays_of_the_look(run_ranks, tiny, tmp_path: Path) -> None:
    run_ranks(2, "train", tiny.config(tmp_path / "run", step_scheduler__max_steps=1))
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


@pytest.mark.parametrize("size", [None, 3])
def test_a_commit_misses_a_file_that_another_rank_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int | None
) -> None:
    """It is not there, or not whole: no checkpoint then, and the one before stays."""
    monkeypatch.setattr(checkpoint, "SEEN_WITHIN", 0.2)
    folders = [begin_checkpoint(tmp_path, step) for step in (1, 2)]
    for step, folder in enumerate(folders, start=1):
        write_state(folder, step, {"identity": {}, "loader": {}})
        (folder / "part").write_bytes(b"other rank")
    listing = list_files(folders[0], [folders[0] / "part"])
    commit_checkpoint(tmp_path, 1, folders[0], listing)
    (folders[1] / "part").unlink()
    if size is not None:
        (folders[1] / "part").write_bytes(b"o" * size)
    with pytest.raises(OSError, match="another process has written it.*processes must share") as caught:
        commit_checkpoint(tmp_path, 2, folders[1], listing)
    assert str(caught.value.filename).endswith("part") and not (tmp_path / "step_2").exists()
    verify(tmp_path / "step_1")
    assert os.readlink(tmp_path / "latest") == "step_1"


@pytest.mark.parametrize("damaged", [False, True])
def test_ranks_divide_the_files_that_a_resume_checks(
    run_ranks, tiny, train_tiny, tmp_path: Path, damaged: bool
) -> None:
    """Each file is read once, by whichever rank; what one finds all say alike."""
    root = train_tiny(tiny.config(tmp_path / "run", step_scheduler__max_steps=1)).root
    if damaged:
        shutil.copytree(root / "step_1", root / "step_2")
        name = sorted(json.loads((root / "step_2" / "manifest.json").read_text())["files"])[1]
        content = bytearray((root / "step_2" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (root / "step_2" / name).write_bytes(content)
    (found, mine), (other, theirs) = run_ranks(2, "find_and_count", str(root))
    assert found == other and found.startswith("step_1 of step 1")
    if damaged:
        assert f"step_2 is damaged: {name} does not match its checksum" in found
    else:
        files = [Path(name).name for name in json.loads((root / "step_1" / "manifest.json").read_text())["files"]]
        assert sorted([*mine, *theirs]) == sorted(files) and abs(len(mine) - len(theirs)) <= 1
