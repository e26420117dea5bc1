"""Laws of `unmask chat`, at a terminal or not: however it ends, the terminal is as it was and files are whole."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

# `unmask chat`, slow enough to be met in the middle of an answer.
SLOW = """
import sys, time
from unmask.cli import main
from unmask.sampling import view

draw = view.Watcher.__call__

def slowly(self, event):
    draw(self, event)
    time.sleep(0.2)

view.Watcher.__call__ = slowly
sys.exit(main(sys.argv[1:]))
"""
FLAGS = ["--max_new_tokens", "32", "--steps", "32", "--device", "cpu", "--eos", "suppress"]


class Terminal:
    """A process that has a terminal for all three streams, and what it has shown there."""

    def __init__(self, words: list[str]) -> None:
        self.controller, self.terminal = pty.openpty()
        self.modes = termios.tcgetattr(self.terminal)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *words], stdin=self.terminal, stdout=self.terminal, stderr=self.terminal,
            env={**os.environ, "TERM": "xterm"}, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its terminal, as a shell's child has one
        )  # fmt: skip
        self.seen, self.after = b"", 0

    def wait_for(self, text: bytes) -> None:
        while (found := self.seen.find(text, self.after)) < 0:
            self.seen += os.read(self.controller, 4096)
        self.after = found + len(text)

    def type(self, line: str) -> None:
        os.write(self.controller, line.encode() + b"\r")

    def end_by(self, number: int) -> None:
        """Send a signal, and check that it ends the process and that the terminal is as before it."""
        self.process.send_signal(number)
        assert self.process.wait(30) == -number
        os.set_blocking(self.controller, False)
        try:
            while more := os.read(self.controller, 4096):
                self.seen += more
        except OSError:
            pass
        assert termios.tcgetattr(self.terminal) == self.modes
        assert self.seen.rfind(b"\x1b[?25h") >= self.seen.rfind(b"\x1b[?25l")
        os.close(self.terminal)
        os.close(self.controller)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was_and_saved_files_whole(
    fixtures: Path, tmp_path: Path, number: int
) -> None:
    saved = tmp_path / "talk.jsonl"
    terminal = Terminal(["chat", "--checkpoint", str(fixtures / "mdlm_step"), *FLAGS])
    terminal.wait_for(b"> ")
    terminal.type("so?")
    terminal.wait_for(b"calls (")
    terminal.wait_for(b"> ")
    terminal.type(f"/save {saved}")
    terminal.wait_for(b"as row 1")
    terminal.type("and then?")
    terminal.wait_for(b"\x1b[?25l")  # in the middle of an answer, which is a live line
    terminal.end_by(number)
    assert terminal.seen.count(b"\x1b[?25l") >= 1
    assert [len(json.loads(line)["messages"]) for line in saved.read_text().splitlines()] == [2]
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.slow
def test_a_signal_at_the_prompt_leaves_the_terminal_as_it_was(fixtures: Path) -> None:
    terminal = Terminal(["chat", "--checkpoint", str(fixtures / "mdlm_step"), *FLAGS])
    terminal.wait_for(b"> ")
    terminal.type("/seed 1")
    terminal.wait_for(b"seed: 1")
    terminal.wait_for(b"> ")
    time.sleep(1)  # the prompt is written before input is waited for
    terminal.end_by(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("<&-", 0, ""),
        ("</dev/null", 0, ""),
        (">&-", 2, "unmask: error: standard output: Bad file descriptor"),
        (">/dev/full", 2, "unmask: error: standard output: No space left on device"),
    ],
)
def test_chat_without_a_stream_ends_in_one_line(fixtures: Path, redirection: str, status: int, said: str) -> None:
    words = [sys.executable, "-m", "unmask", "chat", "--checkpoint", str(fixtures / "mdlm_step"), *FLAGS]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *words], input="so?\n", capture_output=True, text=True
    )
    assert done.returncode == status and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
