"""Law: no command line ends in a traceback or leaves anything; what is wrong is one line, and the exit status 2.

The lines are drawn from fixed seeds: flags, fields and paths of each command with values of every odd sort.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import build_parser, main
from unmask.config import config_from_mapping
from unmask.config.run import to_mapping

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1", "1e400", "0x10", "1_0", "٣", "-0", "9" * 30, "9" * 5000, "1.5"]
WORDS = ["", "x", "True", "null", "half\ud83d", "😀", "a\nb", "\x1b[31m", "[]", "{}", "[1,2", "{a: 1}", "[" * 200, "-",
         "--", "--help=", "*", "%s", "{0}", "=", "!!python/object:os.system x"]  # fmt: skip
PATHS = ["dir", "empty", "pipe", "loop", "gone", "/dev/zero", "/proc/self/mem", "/proc/self/environ", "/", "..",
         "a" * 300, "a/" * 3000, "~nosuchuser/x", "nobody/nothing", "model", "model/config.json",
         "model/model.safetensors", "run.yaml", "bad.yaml", "rows.jsonl", os.fsdecode(b"lat\xe9")]  # fmt: skip
QUICK = ["--device", "cpu", "--max_new_tokens", "1", "--steps", "1"]
LINES = [
    ["train", "-c", "run.yaml", "--optimizer.lr", "1", "--checkpoint.checkpoint_dir", "out/run", "--dry-run"],
    ["generate", "--checkpoint", "model", "--prompt", "a", *QUICK],
    ["generate", "--checkpoint", "model", "--input", "rows.jsonl", "--output", "out/answers.jsonl", *QUICK],
    ["chat", "--checkpoint", "model", *QUICK],
    ["eval", "--checkpoint", "model", "--tasks", "gsm8k", "--data", "rows.jsonl", "--output", "out/eval", *QUICK],
    ["export", "--checkpoint", "model", "--output", "out/model"],
    ["prep", "gsm8k", "--source", "dir", "--output", "out/data"],
    ["plot", "model", "--output", "out/plot.png"],
    ["report", "model", "--output", "out/page.html"],
    ["quickstart", "--output", "out/quick", "--steps", "0"],
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "model")
    tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run"))
    (tmp_path / "bad.yaml").write_text("a: [\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "dir").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def flags_of(command: str, fields: list[str]) -> list[str]:
    (commands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    names = [name for each in commands.choices[command]._actions for name in each.option_strings]
    return [*names, *(fields if command == "train" else [])]


def dotted(values: dict[str, Any], where: str = "") -> list[str]:
    inner = [
        name for key, value in values.items() if isinstance(value, dict) for name in dotted(value, f"{where}{key}.")
    ]
    return [f"--{where}{key}" for key in values] + inner


def wrong_line(draw: random.Random, fields: list[str]) -> list[str]:
    """Return a command line that was right before one or two of its words were changed."""
    words = list(draw.choice(LINES))
    for _ in range(draw.choice((1, 1, 2))):
        value = draw.choice(draw.choice((NUMBERS, WORDS, PATHS)))
        place = draw.randrange(1, len(words) + 1)
        flag = draw.choice([name for name in flags_of(words[0], fields) if "nproc" not in name])
        start, stop, new = draw.choice([
            (len(words), len(words), [flag, value]), (len(words), len(words), [f"{flag}={value}"]),
            (place, place + 1, [value]), (place, place, [value]), (place, place + 1, []),
        ])  # fmt: skip
        words[start:stop] = new
    return words


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 60), pytest.param(2, 1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_a_wrong_command_line_is_one_line(
    place: Path, tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int, count: int
) -> None:
    draw = random.Random(seed)
    fields = dotted(to_mapping(config_from_mapping(tiny.config(place)).config))
    before, refused = {path.name for path in place.iterdir()}, 0
    for _ in range(count):
        words = wrong_line(draw, fields)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
        try:
            status = main(words)
        except SystemExit as left:  # --help and --version
            status = left.code
        said = capsys.readouterr().err
        if status != 0:
            assert status == 2 and said.startswith("unmask: error: ") and said.count("\n") == 1, (words, status, said)
            assert {path.name for path in place.iterdir()} <= before, words
            refused += 1
        for path in place.iterdir():  # of those that were right
            if path.name not in before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert refused > count / 2


@pytest.mark.parametrize("words", [["generate", "--prompt=--"], ["eval", "--checkpoint=--"], ["train", "-c=--"]])
def test_two_dashes_are_no_value(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "`--` is no value" in said and said.count("\n") == 1
