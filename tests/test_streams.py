"""Law: standard output and error that cannot be written end no work; where they are all there is, they end quietly."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAIN = [sys.executable, "-m", "unmask", "train", "-c"]
# A command that prints, does lasting work and prints again, in place of a real one, which takes seconds to start.
STAND_IN = """
import sys
from pathlib import Path
from unmask import cli
from rich.console import Console
from rich.progress import track

def run(_):
    for number in range(300):
        print("é → 漢 line", number, flush=True)
        print("note", number, file=sys.stderr)
    console = Console()
    console.print("[bold]é → ░▒▓[/bold]")
    for _ in track(range(3), console=console):
        pass
    Path(sys.argv[-1]).write_text("done")

cli.{module}.run = run
sys.exit(cli.main({words}))
"""


def stand_in(tmp_path: Path, words: list[str]) -> list[str]:
    script = STAND_IN.format(module=words[0], words=words)
    return [sys.executable, "-c", script, str(tmp_path / "done")]


LASTING = ["plot", "x"]
PRINTS = ["generate", "--checkpoint", "x", "--prompt", "a"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("way", ["gone", "full", "closed"])
def test_lasting_work_goes_on_without_output(tmp_path: Path, way: str, stream: str) -> None:
    number = {"stdout": 1, "stderr": 2}[stream]
    command = ["sh", "-c", f'exec "$@" {number}>&-', "sh"] if way == "closed" else []
    others = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if way == "gone":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run([*command, *stand_in(tmp_path, LASTING)], **(others | {stream: write}))
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == "done"
    if stream == "stdout":
        assert done.stderr == "".join(f"note {number}\n" for number in range(300)).encode()
    else:
        assert done.stdout.count(b"\n") > 300


@pytest.mark.parametrize("words", [PRINTS, ["--help"], ["train", "--help"]])
def test_what_only_prints_ends_quietly_when_its_reader_left(tmp_path: Path, words: list[str]) -> None:
    command = stand_in(tmp_path, words) if words is PRINTS else [sys.executable, "-m", "unmask", *words]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and b"Error" not in done.stderr and b"error" not in done.stderr
    assert not (tmp_path / "done").exists()  # nobody reads the rest


@pytest.mark.parametrize("words", [PRINTS, ["--help"], ["--version"]])
def test_results_that_a_full_disk_lost_are_told(tmp_path: Path, words: list[str]) -> None:
    command = stand_in(tmp_path, words) if words is PRINTS else [sys.executable, "-m", "unmask", *words]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("unmask: error: standard output: No space left on device")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("words", [PRINTS, ["--help"], ["chat", "--checkpoint", "x"], ["doctor"]])
def test_results_that_have_nowhere_to_go_are_told(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "unmask", *words] if words[0] == "--help" else stand_in(tmp_path, words)
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(closed, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "unmask: error: standard output: Bad file descriptor; what was printed is not complete"
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr and not (tmp_path / "done").exists()


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "cp1252", "latin-1"])
def test_another_charset_ends_no_command(tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(stand_in(tmp_path, PRINTS), capture_output=True, env=environment)
    assert done.returncode == 0 and (tmp_path / "done").exists() and b"Traceback" not in done.stderr
    assert b" ? line 299" in done.stdout


def test_a_pipe_that_does_not_wait_loses_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen(stand_in(tmp_path, PRINTS), stdout=write, stderr=subprocess.DEVNULL) as process:
        os.close(write)
        with open(read, "rb") as lines:
            text = lines.read()
        assert process.wait() == 0 and text.count(b" line ") == 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_cursor_visible(number: int) -> None:
    script = (
        "import time; from rich.console import Console; from rich.live import Live; from unmask import cli\n"
        "def run(_):\n"
        "    with Live('answer', console=Console(force_terminal=True)):\n"
        "        print('drawing', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.chat.run = run\n"
        "cli.main(['chat', '--checkpoint', 'x'])\n"
    )
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    while b"drawing" not in seen:
        seen += os.read(controller, 4096)
    process.send_signal(number)
    assert process.wait() == -number
    try:
        while more := os.read(controller, 4096):
            seen += more
    except OSError:  # Linux says so where nobody has the terminal open any more
        pass
    os.close(controller)
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--nproc-per-node", "2"]])
@pytest.mark.parametrize("way", ["gone", "full", "closed"])
def test_training_goes_on_and_its_log_says_that_nobody_hears(
    tiny: Any, tmp_path: Path, way: str, more: list[str]
) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run"))
    command = [*TRAIN, str(path), *more]
    if way == "gone":
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read()
        status, problem = process.returncode, "Broken pipe"
    elif way == "closed":
        done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE)
        status, said, problem = done.returncode, done.stderr, "Bad file descriptor"
    else:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
        status, said, problem = done.returncode, done.stderr, "No space left on device"
    assert status == 0 and b"Traceback" not in said and b"rror" not in said
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["problem"] for event in events if event["event"] == "output"] == [f"standard output: {problem}"]
    assert events[-1]["event"] == "end" and (tmp_path / "run" / "step_6" / "manifest.json").is_file()
