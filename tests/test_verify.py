"""Law: one changed bit in the weights of a run is told by every command that reads them, unless it is told not to."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import unmask
from unmask.cli import main
from unmask.errors import ModelError
from unmask.evaluation.lm_eval import UnmaskLM
from unmask.models import manifest


@pytest.fixture(scope="module")
def runs(tiny, tiny_base: Path, train_tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of a whole model and of an adapter, two steps in each."""
    root = tmp_path_factory.mktemp("runs")
    steps = {"step_scheduler__max_steps": 2, "step_scheduler__ckpt_every_steps": 1}
    train_tiny(tiny.config(root / "whole", **steps))
    values = tiny.config(root / "adapter", **steps, peft={"r": 2, "target_modules": ["*.q_proj"]})
    train_tiny({**values, "model": {"pretrained_model_name_or_path": str(tiny_base)}})
    return {name: root / name for name in ("whole", "adapter")}


def flip(file: Path) -> None:
    """Change the lowest bit of a file's last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.fixture
def damaged(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def damage(kind: str) -> Path:
        root = shutil.copytree(runs[kind], tmp_path / kind, symlinks=True)
        flip(root / "step_2" / ("model.safetensors" if kind == "whole" else "adapter_model.safetensors"))
        return root

    return damage


GENERATE = ["generate", "--prompt", "so?", "--steps", "1", "--max_new_tokens", "1", "--device", "cpu"]


def reading(command: str, model: list[str], place: Path) -> list[str]:
    if command == "generate":
        return [*GENERATE, *model]
    if command == "export":
        return ["export", *model, "--output", str(place / "exported")]
    if command == "chat":
        return ["chat", *model, "--device", "cpu", "--max_new_tokens", "1", "--steps", "1"]
    data = place / "asked.jsonl"
    data.write_text('{"question": "so?", "answer": "1"}\n')
    return ["eval", *model, "--tasks", "gsm8k", "--data", str(data), "--output", str(place / "evaluated"), "--device",
            "cpu", "--max_new_tokens", "1", "--steps", "1"]  # fmt: skip


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("command", ["generate", "export", "chat", "eval"])
def test_a_changed_bit_is_named(
    damaged: Callable[[str], Path],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    command: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"so?\n")))
    root = damaged(kind)
    model = ["--checkpoint", str(root)] if kind == "whole" else ["--checkpoint", str(tiny_base), "--adapter", str(root)]
    words = reading(command, model, tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step_2 is damaged" in said and "model.safetensors does not match" in said and "an older checkpoint" in said
    assert not (tmp_path / "exported").exists()
    assert main([*words, "--no-verify"]) == 0


def test_training_from_a_damaged_checkpoint(
    damaged: Callable[[str], Path], tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny.config(tmp_path / "new", step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": str(damaged("whole"))}
    assert main(["train", "-c", str(tiny.write(tmp_path / "new.yaml", values))]) == 2
    assert "step_2 is damaged: model.safetensors" in capsys.readouterr().err


def test_lm_eval(damaged: Callable[[str], Path]) -> None:
    words = f"pretrained={damaged('whole')},device=cpu"
    with pytest.raises(ModelError, match=r"step_2 is damaged: model\.safetensors"):
        UnmaskLM.create_from_arg_string(words)
    UnmaskLM.create_from_arg_string(words + ",verify=false")


def test_python(damaged: Callable[[str], Path], tiny_base: Path) -> None:
    whole, adapter = damaged("whole"), damaged("adapter")
    with pytest.raises(ModelError, match=r"step_2 is damaged: model\.safetensors"):
        unmask.load_model(str(whole))
    with pytest.raises(ModelError, match=r"step_2 is damaged: adapter_model\.safetensors"):
        unmask.load_model(str(tiny_base), adapter=str(adapter))
    unmask.load_model(str(whole), verify=False)
    unmask.load_model(str(tiny_base), adapter=str(adapter), verify=False)


def test_what_is_wrong_is_told_rather_than_what_it_led_to(runs: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(runs["whole"] / "step_2", tmp_path / "step_2")
    (root / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match=r"step_2 is torn: its manifest\.json is missing or unreadable"):
        unmask.load_model(str(root))


def test_what_only_a_resume_reads_is_not_checked(runs: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(runs["whole"] / "step_2", tmp_path / "step_2")
    shutil.rmtree(root / "optimizer")
    (root / "config.yaml").write_text("# read")
    unmask.load_model(str(root))


@pytest.mark.parametrize("content", [None, "{}", "[]", "no JSON"])
def test_a_folder_of_another_tool_has_no_manifest_of_ours(tiny_base: Path, tmp_path: Path, content: str | None) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    flip(folder / "model.safetensors")
    for name in ("manifest.json", "state.json"):
        (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / "manifest.json").write_text(content)
    unmask.load_model(str(folder))


@pytest.mark.parametrize(
    "content",
    [None, "PIPE", "", "[]", "[" * 100_000, '{"files": []}', '{"files": {"model.safetensors": []}}',
     '{"files": {"model.safetensors": [1]}}', '{"files": {"model.safetensors": [' + "9" * 5000 + ', 1]}}',
     '{"files": {"model.safetensors": [NaN, 1]}}', '{"files": {}}', '{"files": {"../model.safetensors": [0, 0]}}',
     b"\xff"],
)  # fmt: skip
def test_a_lost_or_malformed_manifest_is_damage(runs: dict[str, Path], tmp_path: Path, content: str | bytes) -> None:
    folder = shutil.copytree(runs["whole"] / "step_2", tmp_path / "step_2")
    (folder / "manifest.json").unlink()
    if content == "PIPE":
        os.mkfifo(folder / "manifest.json")
    elif content is not None:
        (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=r"step_2 is (torn|damaged): .* manifest\.json"):
        unmask.load_model(str(folder))


def test_weights_beside_those_of_the_manifest_are_not_taken(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["whole"] / "step_2", tmp_path / "step_2")
    listed = json.loads((folder / "manifest.json").read_text())
    del listed["files"]["model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(ModelError, match=r"step_2 is damaged: model\.safetensors is not in its manifest\.json"):
        unmask.load_model(str(folder))


def test_an_interrupted_loading_does_not_wait_for_the_checksums(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = threading.Event()

    def slow(chunk: bytes, value: int) -> int:
        reading.set()
        time.sleep(0.1)
        return value

    monkeypatch.setattr(manifest.zlib, "crc32", slow)
    monkeypatch.setattr(manifest, "_CHUNK", 64)  # minutes for the tiny model
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), manifest.intact(runs["whole"] / "step_2"):
        assert reading.wait(5)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 1
