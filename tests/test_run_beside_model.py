"""Law: of a folder with a model and a run in it what was trained is read, or it is said; no run begins in one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.models.folders import find_adapter
from unmask.models.tokenizer import find_tokenizer
from unmask.models.weights import read_tensors

QUICK = ["--prompt", "so?", "--steps", "1", "--max_new_tokens", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tiny, tiny_base: Path, train_tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    train_tiny(tiny.config(root / "whole", step_scheduler__max_steps=1))
    values = tiny.config(root / "adapter", step_scheduler__max_steps=1, peft={"r": 2, "target_modules": ["*.q_proj"]})
    train_tiny({**values, "model": {"pretrained_model_name_or_path": str(tiny_base)}})
    return {name: root / name for name in ("whole", "adapter")}


def into(model: Path, run: Path, place: Path) -> Path:
    """Return a model's folder with a run in it, as an earlier version let happen."""
    shutil.copytree(model, place)
    return shutil.copytree(run, place, symlinks=True, dirs_exist_ok=True)


@pytest.mark.parametrize("linked", [True, False])
def test_what_was_trained_into_a_model_is_exported(
    runs: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], linked: bool
) -> None:
    both = into(tiny_base, runs["whole"], tmp_path / "both")
    if not linked:
        (both / "latest").unlink()
    assert main(["export", "--checkpoint", str(both), "--output", str(tmp_path / "exported")]) == 0
    said = capsys.readouterr().err
    assert f"warning: {both}: took the run's checkpoint step_1, not the config.json beside it\n" in said
    trained, exported = (dict(read_tensors(folder)) for folder in (runs["whole"] / "step_1", tmp_path / "exported"))
    assert all(bool((exported[key] == tensor).all()) for key, tensor in trained.items())
    assert find_tokenizer(str(both)).resolve() == both / "step_1"


def test_an_adapter_that_was_trained_into_its_base(
    runs: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = into(tiny_base, runs["adapter"], tmp_path / "both")
    assert main(["generate", "--checkpoint", str(both), *QUICK]) == 0
    said = capsys.readouterr().err
    assert f"{both}: took the config.json in it, not the run's checkpoint step_1, which is an adapter" in said
    assert find_tokenizer(str(both)) == both and find_adapter(both).resolve() == both / "step_1"


def test_an_adapter_beside_a_run(
    runs: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = into(runs["adapter"] / "step_1", runs["adapter"], tmp_path / "both")
    assert main(["generate", "--checkpoint", str(tiny_base), "--adapter", str(both), *QUICK]) == 0
    said = capsys.readouterr().err
    assert f"--adapter: {both}: took the run's checkpoint step_1, not the adapter_config.json beside it" in said


def test_a_run_whose_link_was_lost(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(runs["whole"], tmp_path / "run", ignore=shutil.ignore_patterns("latest"))
    for number in (2, 10):
        shutil.copytree(root / "step_1", root / f"step_{number}")
    assert main(["generate", "--checkpoint", str(root), *QUICK]) == 0
    assert "took step_10, the last one, since the link `latest` is missing" in capsys.readouterr().err


def test_nothing_is_said_without_a_choice(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in (runs["whole"], runs["whole"] / "step_1"):
        assert main(["generate", "--checkpoint", str(checkpoint), *QUICK]) == 0
        assert "took" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_no_run_begins_in_the_folder_of_a_model(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: list[str]
) -> None:
    root = tmp_path / "model"
    root.mkdir()
    (root / name).write_text("{}")
    path = tiny.write(tmp_path / "run.yaml", tiny.config(root, step_scheduler__max_steps=1))
    assert main(["train", "-c", str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert f"checkpoint.checkpoint_dir: {root} holds {name}" in said and said.count("\n") == 1
    assert [file.name for file in root.iterdir()] == [name]
