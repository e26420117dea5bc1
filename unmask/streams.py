"""Standard streams of the command line: a closed pipe or a full disk behind them never ends a training run.

Where a pipe has lost its reader or a disk is full, Python raises an OSError in whatever happens to print, and once more
when it flushes at its end. The streams here catch it in the one call through which `print`, rich and logging all write.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import termios
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

_SHOW_CURSOR = b"\x1b[?25h"


class OutputLost(Exception):
    """Standard output cannot be written, and the command's whole result is what it prints.

    It is no OSError, since rich and argparse catch those.

    Attributes:
        reader_left: the reader closed the pipe, as `head` does; otherwise results are lost.
    """

    def __init__(self, problem: str, reader_left: bool) -> None:
        super().__init__(problem)
        self.reader_left = reader_left


class _Stream(io.RawIOBase):
    """A raw stream over a file descriptor; once a write has failed, what is written is dropped without an error.

    Attributes:
        needed: raise OutputLost at that failure.
        problem: what failed, for a message; None so far.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name
        self.needed = False
        self.problem: str | None = None

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        """Write bytes and return their number; after a failure all writes go to the null device."""
        while True:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # another program that shares this pipe has made it non-blocking
                select.select((), (self.descriptor,), ())
            except OSError as error:
                self.problem = f"{self.name}: {error.strerror}"
                # So that later writes succeed: Python's own last flush, those of C libraries and of started processes.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.descriptor)
                os.close(null)
                if self.needed:
                    raise OutputLost(self.problem, isinstance(error, BrokenPipeError)) from None
                return len(data)


def lost_outputs() -> list[str]:
    """Return a line for each of standard output and standard error that could not be written, with the reason."""
    return [raw.problem for raw in map(_raw, (sys.stdout, sys.stderr)) if raw is not None and raw.problem is not None]


def need_output(needed: bool) -> None:
    """Choose what a failure of standard output does: raise OutputLost where it is `needed`, else nothing."""
    if (raw := _raw(sys.stdout)) is not None:
        raw.needed = needed


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Context in which standard output and error raise for no character and no failed write (but see `need_output`).

    A signal that ends the process leaves the terminal as it was. Streams that a caller has put in place of the
    process's own stay as they are.
    """
    for descriptor in range(3):  # the next file that is opened would get a closed one's number, and what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # so a write there fails and is noticed, also in a started process
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, _Stream(1, "standard output"))
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, _Stream(2, "standard error"))
    handlers = _restore_terminal_at_signals()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OutputLost):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _guarded(stream: TextIO | None, original: TextIO | None, raw: _Stream) -> TextIO:
    """Return a text stream that writes to `raw` as `stream` does; `stream` itself where it is not the `original`."""
    if stream is not original:
        assert stream is not None
        return stream
    buffer = io.BufferedWriter(raw)
    if stream is None:
        return io.TextIOWrapper(buffer, "utf-8", "replace")
    stream.flush()
    unbuffered = bool(getattr(stream, "write_through", False))
    by_line = unbuffered or raw.descriptor == 2 or buffer.isatty()
    return io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=by_line, write_through=unbuffered)


def _raw(stream: Any) -> _Stream | None:
    """Return what a text stream of `_guarded` writes to; None for any other stream."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Stream) else None


def _restore_terminal_at_signals() -> dict[int, Any]:
    """Make SIGTERM and SIGHUP restore the terminal before they end the process.

    A progress line hides the cursor, and `input()` with readline turns off the echo of keys: so they would stay.

    Returns:
        the handlers that were replaced, by signal.
    """
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    modes = termios.tcgetattr(0) if os.isatty(0) else None

    def end(number: int, frame: FrameType | None) -> None:
        for descriptor in terminals:
            with contextlib.suppress(OSError):
                os.write(descriptor, _SHOW_CURSOR)
        with contextlib.suppress(OSError, termios.error):
            # Where another program has the terminal by now, changing it would stop this process.
            if modes is not None and termios.tcgetattr(0) != modes and os.tcgetpgrp(0) == os.getpgrp():
                termios.tcsetattr(0, termios.TCSANOW, modes)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    handlers = {}
    for number in (signal.SIGTERM, signal.SIGHUP) if terminals or modes is not None else ():
        with contextlib.suppress(ValueError):  # raised in any but the main thread
            if signal.getsignal(number) is signal.SIG_DFL:
                handlers[number] = signal.signal(number, end)
    return handlers
