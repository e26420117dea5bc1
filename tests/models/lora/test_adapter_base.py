"""An adapter applied to other weights than it was trained over is pointed out by every command that applies it."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from unmask.cli import main
from unmask.models.folders import base_note


@pytest.fixture(scope="module")
def adapter(tiny, train_tiny, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny.config(tmp_path_factory.mktemp("adapter"), peft={"r": 2}, step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    return train_tiny(values).root / "latest"


@pytest.fixture(scope="module")
def relative(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with other weights of the same shapes."""
    folder = tmp_path_factory.mktemp("relative") / "model"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value * 2 for name, value in tensors.items()}, folder / "model.safetensors")
    for name in ("manifest.json", "state.json"):
        (folder / name).unlink()
    return folder


def test_the_base_is_known_wherever_it_lies_and_others_are_told_apart(
    adapter: Path, tiny_base: Path, relative: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "moved")
    assert base_note(adapter, tiny_base) == base_note(adapter, tmp_path / "moved") == ""
    assert f"was trained over other weights than those of {relative}" in base_note(adapter, relative)


@pytest.mark.parametrize("state", [None, "", "[]", "{}", '{"identity": {"base": null}}'])
def test_where_nothing_is_known_nothing_is_said(adapter: Path, relative: Path, tmp_path: Path, state) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "state.json").unlink()
    if state is not None:
        (folder / "state.json").write_text(state)
    assert base_note(folder, relative) == ""


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "export"])
def test_every_command_says_so(command, adapter, tiny, tiny_base, relative, tmp_path, monkeypatch, capsys) -> None:
    short = ["--max_new_tokens", "4", "--steps", "2"]
    words = {
        "generate": ["--prompt", "so?", *short],
        "chat": short,
        "eval": ["--tasks", "gsm8k", "--data", str(tiny.folder / "train.jsonl"), "--limit", "1", *short],
        "export": [],
    }[command]
    for base, said in ((tiny_base, False), (relative, True)):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"so?\n"), isatty=lambda: False))
        output = ["--output", str(tmp_path / base.name / command)] if command in ("eval", "export") else []
        (tmp_path / base.name).mkdir(exist_ok=True)
        assert main([command, "--checkpoint", str(base), "--adapter", str(adapter), *words, *output]) == 0
        printed = capsys.readouterr()
        assert ("was trained over other weights" in printed.out + printed.err) == said
