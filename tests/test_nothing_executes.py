"""Law: no file of a checkpoint is run or unpickled, whatever lies in it; each is used or refused by name."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

from unmask.cli import main
from unmask.models.weights import read_tensors
from unmask.training.checkpoint import MANIFEST, list_files

ADAPTER = {"r": 2, "target_modules": ["*.q_proj"]}


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def torch_file(planted: Planted) -> bytes:
    file = io.BytesIO()
    torch.save(planted, file)
    return file.getvalue()


ENCODINGS: dict[str, Callable[[Planted], bytes]] = {
    "text": lambda planted: pickle.dumps(planted, protocol=0),
    "binary": pickle.dumps,
    "torch": torch_file,
}

# What other tools, and earlier versions, put beside weights as pickles.
OTHERS = [
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt",
    "rng_state.pth",
    "tokenizer.pkl", ".metadata", "sharded/.metadata", "sharded/__0_0.distcp", "optimizer/.metadata",
    "optimizer/sharded/.metadata", "optimizer/sharded/__0_0.distcp",
]  # fmt: skip

# What our folders do not have and other tools' may, and libraries read.
BESIDE = ["tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
          "processor_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny, tiny_base: Path, train_tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory of each kind of checkpoint, one step in it."""
    root = tmp_path_factory.mktemp("runs")
    whole = root / "whole"
    train_tiny(tiny.config(whole, step_scheduler__max_steps=1))
    values = tiny.config(root / "adapter", step_scheduler__max_steps=1, peft=ADAPTER)
    train_tiny({**values, "model": {"pretrained_model_name_or_path": str(tiny_base)}})
    parts = shutil.copytree(whole, root / "parts", symlinks=True) / "step_1"  # as several ranks write it
    for folder in (parts, parts / "optimizer"):
        writer = HuggingFaceStorageWriter(str(folder / "sharded"), save_distributed=True)
        with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
            save(dict(read_tensors(folder)), storage_writer=writer, no_dist=True)
        (folder / "model.safetensors").unlink()
    listed(parts)
    assert main(["export", "--checkpoint", str(whole), "--output", str(root / "exported")]) == 0
    return {name: root / name for name in ("whole", "adapter", "parts", "exported")}


def folder_of(root: Path) -> Path:
    """Return where the files of a run's only checkpoint lie, or of an exported folder."""
    return root / "step_1" if (root / "step_1").is_dir() else root


def listed(folder: Path) -> None:
    """Let the manifest of a checkpoint agree with what lies in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    (folder / MANIFEST).write_text(json.dumps({"format": 2, "files": list_files(folder, files)}))


def commands(tiny, kind: str, root: Path, base: Path, place: Path) -> Iterator[list[str]]:
    """Yield every command line that reads a checkpoint of that kind."""
    model = ["--checkpoint", str(root)] if kind != "adapter" else ["--checkpoint", str(base), "--adapter", str(root)]
    yield ["generate", *model, "--prompt", "so?", "--steps", "1", "--max_new_tokens", "1", "--device", "cpu"]
    yield ["export", *model, "--output", str(place / "exported")]
    data = place / "asked.jsonl"
    data.write_text('{"question": "so?", "answer": "1"}\n')
    yield ["eval", *model, "--tasks", "gsm8k", "--data", str(data), "--output", str(place / "evaluated"), "--device",
           "cpu", "--steps", "1", "--max_new_tokens", "1"]  # fmt: skip
    if kind == "exported":
        fresh = tiny.config(place / "new", step_scheduler__max_steps=1)
        fresh["model"] = {"pretrained_model_name_or_path": str(root)}
        fresh["dataset"]["tokenizer"] = {"pretrained_model_name_or_path": str(root)}
        yield ["train", "-c", str(tiny.write(place / "start.yaml", fresh))]
        return
    values = tiny.config(root, step_scheduler__max_steps=2, **({"peft": ADAPTER} if kind == "adapter" else {}))
    if kind == "adapter":
        values["model"] = {"pretrained_model_name_or_path": str(base)}
    yield ["train", "-c", str(tiny.write(place / "resume.yaml", values))]
    if kind != "adapter":
        fresh = tiny.config(place / "new", step_scheduler__max_steps=1)
        fresh["model"] = {"pretrained_model_name_or_path": str(root)}
        yield ["train", "-c", str(tiny.write(place / "start.yaml", fresh)), "--dry-run"]


def planted_files(root: Path) -> list[str]:
    folder = folder_of(root)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["whole", "parts", "adapter", "exported"])
@pytest.mark.parametrize(
    "encoding", ["binary", pytest.param("text", marks=pytest.mark.slow), pytest.param("torch", marks=pytest.mark.slow)]
)
def test_a_planted_pickle_is_never_read(
    tiny,
    tiny_base: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    encoding: str,
) -> None:
    marker = tmp_path / "it ran"
    content, problems = ENCODINGS[encoding](Planted(marker)), []
    for number, name in enumerate([*planted_files(runs[kind]), *BESIDE, OTHERS]):
        place = tmp_path / str(number)
        root = shutil.copytree(runs[kind], place / "run", symlinks=True)
        for file in [name] if isinstance(name, str) else name:
            (folder_of(root) / file).parent.mkdir(parents=True, exist_ok=True)
            (folder_of(root) / file).write_bytes(content)
        if name != MANIFEST and kind != "exported":
            listed(root / "step_1")
        for words in commands(tiny, kind, root, tiny_base, place):
            try:
                status: Any = main(words)
            except Exception as error:
                status = repr(error)
            said = capsys.readouterr().err
            assert not marker.exists(), (name, words)
            # What nobody reads harms nobody. As a template, a pickle of text is a long prompt.
            named = isinstance(name, str) and (str(place) in said or name == "chat_template.jinja")
            refused = status == 2 and named and said.count("\n") == 1
            if status != 0 and not refused:
                problems.append((name, words[0], status, said))
    assert not problems


def test_an_index_that_names_a_pickle_as_a_shard(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    keys = [key for key, _ in read_tensors(folder)]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_file(Planted(tmp_path / "it ran")))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(keys, "pytorch_model.bin")})
    )
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "so?", "--device", "cpu"]) == 2
    assert "pytorch_model.bin: not a whole safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "it ran").exists()


def test_the_pickle_of_this_test_would_run(tmp_path: Path) -> None:
    for encoding in ENCODINGS.values():
        marker = tmp_path / "it ran"
        content = encoding(Planted(marker))
        torch.load(io.BytesIO(content), weights_only=False) if encoding is torch_file else pickle.loads(content)
        assert marker.exists()
        marker.unlink()


def test_code_beside_a_model_is_not_imported(runs: dict[str, Path], tmp_path: Path) -> None:
    folder, marker = shutil.copytree(runs["exported"], tmp_path / "model"), tmp_path / "it ran"
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name, autos in (("config.json", ("AutoConfig", "AutoModel")), ("tokenizer_config.json", ("AutoTokenizer",))):
        values = json.loads((folder / name).read_text())
        classes = [None, "planted.Planted"] if autos == ("AutoTokenizer",) else "planted.Planted"
        values["auto_map"] = dict.fromkeys(autos, classes)
        (folder / name).write_text(json.dumps(values))
    words = ["--prompt", "so?", "--steps", "1", "--max_new_tokens", "1", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(folder), *words]) == 0
    assert main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "exported")]) == 0
    assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "import marshal",
        "import yaml\nyaml.load('')",
        "eval('1')",
        "exec('1')",
    ],
)
def test_the_lint_rule_bans_what_runs_code(code: str) -> None:
    place = Path(__file__).parents[1]
    words = ["-m", "ruff", "check", "--no-cache", "--stdin-filename", "unmask/new.py", "-"]
    done = subprocess.run([sys.executable, *words], input=code + "\n", cwd=place, capture_output=True, text=True)
    assert done.returncode == 1 and ("TID251" in done.stdout or "S102" in done.stdout or "S307" in done.stdout)


def test_no_code_of_a_model_is_trusted() -> None:
    package = Path(__file__).parents[1] / "unmask"
    trusting = re.compile(r"trust_remote_code\s*=\s*(?!False\b)")
    assert [path for path in package.rglob("*.py") if trusting.search(path.read_text(encoding="utf-8"))] == []


def test_pickled_shards_of_an_earlier_version_are_refused_by_name(
    tiny, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(runs["parts"], tmp_path / "run", symlinks=True)
    shutil.rmtree(root / "step_1" / "sharded")
    (root / "step_1" / "sharded").mkdir()
    (root / "step_1" / "sharded" / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "it ran")))
    manifest = json.loads((root / "step_1" / MANIFEST).read_text())
    (root / "step_1" / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    for words in commands(tiny, "parts", root, root, tmp_path):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert ("an earlier version wrote pickled shards" in said) != ("step_1 has format 1" in said), words
    assert not (tmp_path / "it ran").exists()
