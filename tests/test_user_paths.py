"""Every path that a user gives is checked by one function: no traceback, no hang, one line that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from unmask.cli import main
from unmask.config.data import DatasetConfig
from unmask.data.sources import open_rows
from unmask.errors import ConfigError, UnmaskError
from unmask.models.folders import INDEX, stored_tensors
from unmask.places import user_path

NAMES = ["~nosuchuser/x", "a\0b", "half\ud83d", "x" * 300, "link/inside", ""]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("link")
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path


@pytest.mark.parametrize("name", [*NAMES, "gone", "pipe.jsonl", "/dev/zero"])
def test_a_path_that_cannot_be_used_is_refused_with_the_flag_it_came_by(name: str, place: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--flag: ") as caught:
        user_path(name, "--flag")
    assert "\n" not in str(caught.value)


def test_a_path_that_can_be_used_is_given_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert user_path("~/new/run", "x") == place / "new" / "run"
    assert user_path("😀.yaml", "x") == Path("😀.yaml")
    assert user_path(os.fsdecode(b"latin\xe9"), "x") == Path("latin\udce9")  # how Python spells other bytes of a name
    (place / "real.jsonl").write_text("")
    (place / "good").symlink_to("real.jsonl")
    assert user_path("good", "x") == Path("good")


COMMANDS: list[Callable[[str], list[str]]] = [
    lambda name: ["train", "-c", name],
    lambda name: ["generate", "--checkpoint", name, "--prompt", "x"],
    lambda name: ["generate", "--checkpoint", "CHECKPOINT", "--input", name],
    lambda name: ["generate", "--checkpoint", "CHECKPOINT", "--prompt", "x", "--output", name],
    lambda name: ["generate", "--checkpoint", "CHECKPOINT", "--prompt", "x", "--trace", name],
    lambda name: ["generate", "--checkpoint", "CHECKPOINT", "--adapter", name, "--prompt", "x"],
    lambda name: ["chat", "--checkpoint", name],
    lambda name: ["eval", "--checkpoint", "CHECKPOINT", "--data", name, "--output", "out", "--tasks", "gsm8k"],
    lambda name: ["eval", "--checkpoint", "CHECKPOINT", "--data", "x", "--output", name, "--tasks", "gsm8k"],
    lambda name: ["export", "--checkpoint", name, "--output", "out"],
    lambda name: ["export", "--checkpoint", "CHECKPOINT", "--output", name],
    lambda name: ["plot", name],
    lambda name: ["report", name],
    lambda name: ["prep", "gsm8k", "--source", name, "--output", "out"],
    lambda name: ["prep", "gsm8k", "--output", name],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command("NAME")).replace("CHECKPOINT", "C"))
def test_no_command_takes_such_a_path(command, place: Path, fixtures: Path, capsys: pytest.CaptureFixture) -> None:
    for name in [*NAMES, "gone", "pipe.jsonl"]:
        words = [str(fixtures / "llada_tiny") if word == "CHECKPOINT" else word for word in command(name)]
        status, (_, said) = main(words), capsys.readouterr()
        assert (status, said.count("\n")) == (2, 1) and said.startswith("unmask: error: "), (words, said)


def test_a_data_folder_with_a_pipe_or_a_dangling_link_is_refused(place: Path) -> None:
    folder = place / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for name in ("README.md", "more.jsonl"):
        os.mkfifo(folder / name)
        with pytest.raises(UnmaskError, match=name):
            open_rows(DatasetConfig(path_or_dataset_id=str(folder)))
        (folder / name).unlink()
    (folder / "more.jsonl").symlink_to("nowhere")
    with pytest.raises(UnmaskError, match="more.jsonl is a link to nowhere"):
        open_rows(DatasetConfig(path_or_dataset_id=str(folder)))


@pytest.mark.parametrize("name", ["../x.safetensors", "ABSOLUTE", "a\0b", "sub/../../x.safetensors", "", ["x"], None])
def test_a_shard_outside_its_folder_is_refused_by_name(name: object, tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    name = str(tmp_path / "x.safetensors") if name == "ABSOLUTE" else name
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnmaskError) as caught:
        stored_tensors(folder)
    assert repr(name) in str(caught.value) and "is no file of its folder" in str(caught.value)


def test_a_shard_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UnmaskError, match="a pipe, socket or device"):
        stored_tensors(tmp_path)


def test_a_checkpoint_whose_files_are_pipes_is_refused(place: Path, fixtures: Path, capsys) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copytree(fixtures / "llada_tiny", place / name / "model")
        (place / name / "model" / name).unlink()
        os.mkfifo(place / name / "model" / name)
        assert main(["generate", "--checkpoint", str(place / name / "model"), "--prompt", "x"]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["line\nbreak", "\x1b[31mred", os.fsdecode(b"lat\xe9")])
def test_a_name_of_odd_characters_stays_one_line_without_what_a_terminal_obeys(
    name: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    for command in (["generate", "--prompt", "x", "--checkpoint"], ["export", "--output", "out", "--checkpoint"]):
        shutil.rmtree(place / name, ignore_errors=True)
        assert main([*command, str(place / name)]) == 2
        (place / name).mkdir()
        (place / name / "config.json").write_text("{")
        assert main([*command, str(place / name)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 2 and said.replace("\n", "").isprintable()


def test_a_model_whose_name_is_not_utf8_is_refused_before_it_is_read(place: Path, fixtures: Path, capsys) -> None:
    folder = shutil.copytree(fixtures / "llada_tiny", place / os.fsdecode(b"lat\xe9"))
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "x"]) == 2
    assert "no name that is not UTF-8" in capsys.readouterr().err
