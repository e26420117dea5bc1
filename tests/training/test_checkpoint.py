"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unmask.errors import CheckpointError
from unmask.training import checkpoint
from unmask.training.checkpoint import (
    begin_checkpoint,
    commit_checkpoint,
    find_checkpoint,
    list_files,
    prune,
    verify,
    write_state,
)

IDENTITY = {"model": {"d_model": 8}, "data": "abc"}


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "more").write_text("m")


def save(root: Path, step: int, identity: dict = IDENTITY) -> Path:
    temporary = begin_checkpoint(root, step)
    write(temporary)
    write_state(temporary, step, {"identity": identity, "loader": {"epoch": step}})
    return commit_checkpoint(root, step, temporary, {})


def put(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other moments")


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
        (lambda f: (f / "model.safetensors").write_bytes(b"other weights"), "model.safetensors is not in its manifest"),
        (lambda f: put(f / "optimizer" / "sharded" / "x.safetensors"), "optimizer/sharded/x.safetensors is not in its"),
        (lambda f: (f / "manifest.json").write_text('{"for'), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {"weights": 5}}'), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2, "files": [["weights", 5]]}'), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {"weights": [Infinity, 1]}}'),
            "manifest.json",
        ),
        (lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {}}'), "manifest.json"),
        (
            lambda f: (f / "manifest.json").write_text(
                '{"format": 2, "files": {"%s": [1, 2], "state.json": [1, 2]}}' % ("x" * 999)
            ),
            "xxx",
        ),
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


@pytest.mark.parametrize(
    "state",
    [
        "5", "[]", '{"step": 4}', '{"step": 4, "loader": 5, "identity": {}}', "\udcff", "[" * 100_000,
        *(f'{{"step": {step}, "loader": {{}}, "identity": {{}}}}' for step in ("5", "4.0", "Infinity", "[]", '"4"')),
        *(f'{{"step": 4, "loader": {{}}, "identity": {{}}, "best": {best}}}' for best in (
            "5", "[]", "{}", '{"metric": 1, "value": 1.0, "step": 2}', '{"metric": "m", "value": "1", "step": 2}',
            '{"metric": "m", "value": 1.0, "step": "/"}',
        )),
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_torn(tmp_path: Path, state: str) -> None:
    good, torn = save(tmp_path, 2), save(tmp_path, 4)
    (torn / "state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
    files = list_files(torn, [torn / "state.json"])
    (torn / "manifest.json").write_text(json.dumps({"format": 2, "files": files}))
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None and found.folder == good
    assert found.refused == ("step_4 is torn: its state.json is missing or unreadable",)


def test_a_data_position_of_another_shape_makes_the_older_one_be_used(tmp_path: Path) -> None:
    def fit(position: dict) -> tuple[dict, None]:
        return {"epoch": position["order"]["epoch"]}, None

    for step, position in ((2, {"order": {"epoch": 0}}), (4, {"order": 5})):
        temporary = begin_checkpoint(tmp_path, step)
        write_state(temporary, step, {"identity": IDENTITY, "loader": position})
        commit_checkpoint(tmp_path, step, temporary, {})
    found = find_checkpoint(tmp_path, IDENTITY, fit)
    assert found is not None and found.folder.name == "step_2"
    assert found.refused == ("step_4 is torn: the data position in its state.json cannot be read",)


def test_a_foreign_one_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4, {**IDENTITY, "data": "other"})
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None and found.folder.name == "step_2"
    assert found.refused == ('step_4 is foreign: its data is "other", this run\'s is "abc"',)


def test_an_unknown_format_is_refused_and_what_to_do_said_once(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = save(tmp_path, step)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
        with pytest.raises(CheckpointError, match="format 99.*; resume it with the version that wrote it"):
            verify(folder)
    with pytest.raises(CheckpointError, match="step_2 has format 99.*step_1 has format 99") as caught:
        find_checkpoint(tmp_path, IDENTITY)
    assert str(caught.value).count("the version that wrote it") == 1


def test_the_new_names_are_on_disk_before_a_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, original = [], checkpoint._to_disk

    def to_disk(path: Path) -> None:
        synced.append((path, os.path.islink(tmp_path / "latest")))
        original(path)

    monkeypatch.setattr(checkpoint, "_to_disk", to_disk)
    save(tmp_path, 1)
    assert synced[-1] == (tmp_path, True)


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
