"""Laws of commands that meet another of their kind: beside a running one refused, after a finished one idle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.places import LOCK, hold, lock_beside
from unmask.quickstart import CONFIG

SHORT = ["--max_new_tokens", "4", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def command(tiny_base: Path, tiny, tmp_path: Path) -> Callable[[str], list[str]]:
    """Return a function that gives a command's words, with its output in `tmp_path/out`."""
    data = tmp_path / "in"
    data.mkdir()
    rows = "".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(3))
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(rows)
    out, model = ["--output", str(tmp_path / "out")], ["--checkpoint", str(tiny_base)]
    words = {
        "eval": [*model, "--tasks", "gsm8k", "--data", str(data / "test.jsonl"), *SHORT, *out],
        "generate": [*model, "--prompt", "so?", *SHORT, *out],
        "export": [*model, *out],
        "quickstart": out,
        "prep": ["gsm8k", "--source", str(data), *out],
    }
    return lambda name: [name, *words[name]]


def written(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["eval", "generate", "export", "quickstart"])
def test_a_second_command_on_one_output_is_refused_in_one_line(
    command: Callable[[str], list[str]], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if name == "quickstart":
        out.mkdir()
        (out / CONFIG).write_text("model: {}")
    with hold(out / LOCK if name == "eval" else lock_beside(out), "--output", out, "writes"):
        before = written(tmp_path)
        assert main(command(name)) == 2
        said = capsys.readouterr().err
        assert (
            said.startswith(f"unmask: error: --output: another process (pid {os.getpid()}) ") and said.count("\n") == 1
        )
        assert written(tmp_path) == before


@pytest.mark.parametrize("name", ["eval", "generate", "prep", "export"])
def test_a_command_run_again_changes_nothing(
    command: Callable[[str], list[str]], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(name)) == 0
    first = written(tmp_path)
    capsys.readouterr()
    status = main(command(name))
    assert written(tmp_path) == first and capsys.readouterr().err.count("\n") == (name == "export")
    assert status == (2 if name == "export" else 0)  # what is in a folder that another may have changed is not known


@pytest.mark.parametrize("umask", [0o077, 0o002])
@pytest.mark.parametrize("name", ["eval", "generate", "prep", "export"])
def test_what_a_command_writes_follows_the_umask(
    command: Callable[[str], list[str]], tmp_path: Path, name: str, umask: int
) -> None:
    before = os.umask(umask)
    try:
        assert main(command(name)) == 0
    finally:
        os.umask(before)
    out = tmp_path / "out"
    for path in (out, *out.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, path


# `unmask` with its arguments, which stops for a minute in the middle of writing the weights.
STOPPED = """
import sys, time
from unmask.cli import main
from unmask.models import loading

write = loading.save_weights

def stop(tensors, folder, *more):
    write(tensors, folder, *more)
    print("writing", flush=True)
    time.sleep(60)

loading.save_weights = stop
main(sys.argv[1:])
"""


@pytest.fixture
def stopped_export(command: Callable[[str], list[str]]) -> Iterator[subprocess.Popen[str]]:
    """An export that has written its weights, and not yet taken its place."""
    words = [sys.executable, "-c", STOPPED, *command("export")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_an_export_removes_what_a_killed_one_left(
    stopped_export: subprocess.Popen[str], command: Callable[[str], list[str]], tmp_path: Path
) -> None:
    stopped_export.send_signal(signal.SIGKILL)
    stopped_export.wait()
    (left,) = tmp_path.glob(".out.*.part")
    assert left.name == f".out.{stopped_export.pid}.part" and any(left.iterdir()) and not (tmp_path / "out").exists()
    assert main(command("export")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.slow
def test_an_export_beside_a_running_one_is_refused_and_touches_nothing(
    stopped_export: subprocess.Popen[str],
    command: Callable[[str], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = written(tmp_path)
    assert main(command("export")) == 2
    assert f"another process (pid {stopped_export.pid}) writes" in capsys.readouterr().err
    assert written(tmp_path) == before
