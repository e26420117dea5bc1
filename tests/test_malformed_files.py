"""Law: whatever JSON stands in the files of a run or a job, the next command goes on rightly or names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_shapes import mutated
from unmask.cli import main
from unmask.distributed.ranks import ALONE
from unmask.errors import ConfigError, ModelError
from unmask.models.manifest import MANIFEST, crc32, intact
from unmask.sampling.answers import AnswerFile

CUTS = ["", "null", "{", "[" * 5000, "\xff", "{}\n" * 3, '{"a": 1' + "0" * 5000 + "}"]


def damage(path: Path, draw: random.Random) -> None:
    """Change one value in a JSON or JSONL file, or all of one line."""
    text = path.read_text()
    lines = text.splitlines() if ".jsonl" in path.name else [text]
    number = draw.randrange(len(lines))
    if draw.random() < 0.15:
        lines[number] = draw.choice(CUTS)
    else:
        lines[number] = json.dumps(mutated(json.loads(lines[number]), draw))
    path.write_bytes("".join(line + "\n" for line in lines).encode("latin-1", "replace"))


@pytest.fixture(scope="module")
def run(tiny, train_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The configuration of a run with checkpoints at steps 2 and 4."""
    values = tiny.config(tmp_path_factory.mktemp("run") / "run", step_scheduler__ckpt_every_steps=2)
    values["validation_dataset"] = tiny.validation(max_samples=2)
    values["step_scheduler"]["val_every_steps"] = 2
    values["checkpoint"]["best_metric"] = "validation_loss"
    train_tiny({**values, "step_scheduler": {**values["step_scheduler"], "max_steps": 4}})
    return values


def resumed(values: dict, train_tiny: Callable[..., Any], root: Path, name: str, draw: random.Random) -> str:
    """Damage a file of a copy of a run and train on; return what was printed."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(values["checkpoint"]["checkpoint_dir"], root, symlinks=True)
    damage(root / name, draw)
    if name.endswith("state.json"):  # as one that its writer itself got wrong: a changed file is refused by its sum
        manifest = json.loads((root / "step_4" / MANIFEST).read_text())
        manifest["files"]["state.json"] = [(root / name).stat().st_size, crc32(root / name)]
        (root / "step_4" / MANIFEST).write_text(json.dumps(manifest))
    changed = {**values, "checkpoint": {**values["checkpoint"], "checkpoint_dir": str(root)}}
    after = train_tiny({**changed, "step_scheduler": {**values["step_scheduler"], "max_steps": 5}})
    assert (after.outcome.step, after.outcome.reason) == (5, "finished")
    assert set(after.losses) >= {4, 5} or name == "metrics.jsonl"
    return after.output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["step_4/state.json", f"step_4/{MANIFEST}", "metrics.jsonl"])
def test_a_run_goes_on_from_a_checkpoint_that_it_can_read(
    run: dict, train_tiny: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    draw = random.Random(1)
    said = [resumed(run, train_tiny, tmp_path / "run", name, draw) for _ in range(40)]
    words = "damaged lines were removed" if name == "metrics.jsonl" else "refused: step_4 is "
    assert sum(words in each for each in said) > 10


@pytest.mark.parametrize("name", ["step_4/state.json", f"step_4/{MANIFEST}", "metrics.jsonl"])
def test_a_run_goes_on_after_damage(run: dict, train_tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    for seed in range(3):
        resumed(run, train_tiny, tmp_path / "run", name, random.Random(seed))


def test_weights_are_read_or_their_manifest_is_named(run: dict, tmp_path: Path) -> None:
    draw, refused = random.Random(2), 0
    shutil.copytree(Path(run["checkpoint"]["checkpoint_dir"]) / "step_4", tmp_path / "model")
    for _ in range(300):
        shutil.copy(Path(run["checkpoint"]["checkpoint_dir"]) / "step_4" / MANIFEST, tmp_path / "model" / MANIFEST)
        damage(tmp_path / "model" / MANIFEST, draw)
        try:
            with intact(tmp_path / "model"):
                pass
        except ModelError as error:
            assert str(tmp_path / "model") in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.part", "a.jsonl.part1"])
def test_answers_are_taken_up_or_the_file_is_named(tmp_path: Path, name: str) -> None:
    draw, refused, rows = random.Random(3), 0, ["x", "y", "x"]
    path = tmp_path / "a.jsonl"
    job = AnswerFile(path, rows, {"seed": 1}, ALONE)
    for row in range(3):
        job.add(row, {"text": f"answer {row}", "token_ids": [row]})
    if name == "a.jsonl":
        job.finish({row: {"text": f"answer {row}", "token_ids": [row]} for row in range(3)})
    elif name == "a.jsonl.part1":
        (tmp_path / "a.jsonl.part").rename(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for _ in range(200):
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / name).write_bytes(whole)
        damage(tmp_path / name, draw)
        try:
            again = AnswerFile(path, rows, {"seed": 1}, ALONE)
            if not again.finished:
                again.finish({row: {"text": "again", "token_ids": []} for row in again.missing})
        except ConfigError as error:
            assert name in str(error) and "\n" not in str(error) and len(str(error)) < 600
            refused += 1
        else:
            assert [json.loads(line)["row"] for line in path.read_bytes().splitlines()] == [0, 1, 2]
    assert 20 < refused < 200


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["gsm8k", "likelihood"])
def test_an_evaluation_goes_on_or_names_the_file(
    tiny, tiny_base: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(tiny.folder / "valid.jsonl"), tmp_path / "out"
    words = ["eval", "--checkpoint", str(tiny_base), "--tasks", task, "--data", data, "--max-new-tokens", "4"]
    words += ["--num-samples", "2"] if task == "likelihood" else ["--steps", "2"]
    assert main([*words, "--output", str(out)]) == 0
    files = {path: path.read_bytes() for path in out.iterdir()}
    draw, statuses = random.Random(4), []
    for turn in range(60):
        for path, content in files.items():
            path.write_bytes(content)
        path = draw.choice(list(files))
        damage(path, draw)
        capsys.readouterr()
        against = ["--against", str(out), "--output", str(tmp_path / f"new{turn % 2}")]
        statuses.append(main([*words, *(against if turn % 2 and task == "gsm8k" else ["--output", str(out)])]))
        said = capsys.readouterr().err
        assert statuses[-1] == 0 or (statuses[-1] == 2 and said.count("\n") == 1 and str(path) in said), said
    assert set(statuses) == {0, 2}
