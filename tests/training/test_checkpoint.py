"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from unmask.errors import CheckpointError
from unmask.training import checkpoint
from unmask.training.checkpoint import find_checkpoint, prepare_run_dir, prune, save_checkpoint, verify

IDENTITY = {"model": {"d_model": 8}, "data": "abc"}


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "more").write_text("m")


def save(root: Path, step: int, identity: dict = IDENTITY, writer=write) -> Path:
    return save_checkpoint(root, step, {"identity": identity, "loader": {"epoch": step}}, writer)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_what_is_saved_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, IDENTITY) is None
    save(tmp_path, 9)
    folder = save(tmp_path, 10)
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None and (found.folder, found.state["step"], found.refused) == (folder, 10, ())
    assert os.readlink(tmp_path / "latest") == "step_10"
    assert names(tmp_path) == {"step_9", "step_10", "latest"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"for'), "manifest.json"),
        (lambda f: (f / "weights").unlink(), "weights is missing"),
        (lambda f: (f / "weights").write_bytes(b"w" * 999), "999 bytes instead of 1000"),
        (lambda f: (f / "weights").write_bytes(b"w" * 500 + b"x" + b"w" * 499), "checksum"),
        (lambda f: (f / "sub" / "more").write_text("n"), "checksum"),
        (lambda f: (f / "state.json").write_text("{}"), "state.json"),
    ],
)
def test_a_torn_one_is_refused_by_name_and_the_previous_one_used(tmp_path: Path, damage, words: str) -> None:
    good, torn = save(tmp_path, 2), save(tmp_path, 4)
    damage(torn)
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None and found.folder == good
    assert len(found.refused) == 1 and found.refused[0].startswith("step_4 is ") and words in found.refused[0]
    damage(good)
    with pytest.raises(CheckpointError, match="step_4 is .*step_2 is .*checkpoint_dir"):
        find_checkpoint(tmp_path, IDENTITY)


def test_a_foreign_one_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4, {**IDENTITY, "data": "other"})
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None and found.folder.name == "step_2"
    assert found.refused == ('step_4 is foreign: its data is "other", this run\'s is "abc"',)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        verify(folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_failed_write_leaves_nothing_and_touches_nothing(tmp_path: Path, number: int) -> None:
    save(tmp_path, 2)

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(number, os.strerror(number))

    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 4, writer=fail)
    said = str(caught.value)
    assert str(tmp_path / "step_4") in said and os.strerror(number) in said and "\n" not in said
    assert names(tmp_path) == {"step_2", "latest"} and os.readlink(tmp_path / "latest") == "step_2"
    verify(tmp_path / "step_2")


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def fail(folder: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 1, writer=fail)
    assert names(tmp_path) == set()


def test_a_full_disk_as_safetensors_meets_it(tmp_path: Path) -> None:
    import resource
    import signal

    import torch

    from unmask.models.weights import save_weights

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be saved .*File too large"):
            save(tmp_path, 1, writer=lambda folder: save_weights([("w", torch.zeros(100_000))], folder) and None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == set()


def test_a_mistake_in_the_program_is_not_reported_as_trouble_with_the_disk(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        save(tmp_path, 1, writer=fail)


def test_the_new_names_are_on_disk_before_a_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, original = [], checkpoint._to_disk

    def to_disk(path: Path) -> None:
        synced.append((path, os.path.islink(tmp_path / "latest")))
        original(path)

    monkeypatch.setattr(checkpoint, "_to_disk", to_disk)
    save(tmp_path, 1)
    assert synced[-1] == (tmp_path, True)


def test_a_failed_rename_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="step_4"):
        save(tmp_path, 4)
    assert names(tmp_path) == {"step_2", "latest"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program runs after it but this test."""


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    save(tmp_path, 2)
    moments = 0

    def tick(function):
        def ticking(*arguments, **options):
            nonlocal moments
            if moments == moment:
                raise Killed
            moments += 1
            return function(*arguments, **options)

        return ticking

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_to_disk", tick(checkpoint._to_disk))
        patch.setattr(checkpoint, "_point_latest", tick(checkpoint._point_latest))
        patch.setattr(Path, "rename", tick(Path.rename))
        patch.setattr(os, "replace", tick(os.replace))
        try:
            save(tmp_path, 4)
        except Killed:
            pass
    for folder in checkpoint.checkpoints(tmp_path):
        verify(folder)
    verify(tmp_path / "latest")
    again = save(tmp_path, 4)
    prune(tmp_path, 1, again)
    assert names(tmp_path) == {"step_4", "latest"}


def test_a_step_saved_again_replaces_the_torn_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    (folder / "weights").unlink()
    verify(save(tmp_path, 4))
    prune(tmp_path, None, folder)
    assert names(tmp_path) == {"step_4", "latest"}


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        last = save(tmp_path, step)
    prune(tmp_path, 2, tmp_path / "step_10")
    assert names(tmp_path) == {"step_4", "step_10", "latest"}
    prune(tmp_path, None, last)
    assert names(tmp_path) == {"step_4", "step_10", "latest"}


def test_a_refused_newer_one_never_pushes_out_the_whole_one(tmp_path: Path) -> None:
    torn = save(tmp_path, 30)
    (torn / "weights").unlink()
    save(tmp_path, 20)
    saved = save(tmp_path, 25)
    prune(tmp_path, 1, saved)
    assert names(tmp_path) == {"step_25", "step_30", "latest"}
    assert os.readlink(tmp_path / "latest") == "step_25"


def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(CheckpointError, match=r"checkpoint\.checkpoint_dir: .*taken.* cannot be written"):
            prepare_run_dir(place)
    prepare_run_dir(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
