"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unmask.streams import lost_outputs


class _Bar:
    """A live line of so many things done; where `console` is None, none."""

    def __init__(self, name: str, total: int, console: Console | None, done: int = 0, transient: bool = False) -> None:
        self._progress = None
        if console is not None:
            columns = (
                TextColumn(name),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
            )
            left = (TextColumn("ETA"), TimeRemainingColumn())
            self._progress = Progress(*columns, *left, console=console, transient=transient)
            self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, text: str) -> bool:
        """Show how many are done; return False where there is no line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=text)
        return self._progress is not None


class TrainingProgress:
    """Shows loss, learning rate, gradient norm, speed and time left.

    Args:
        total_steps: the run's length.
        first_step: steps already done (a resumed run).
        console: where to write; when it is no terminal, a plain line every `seconds_between` seconds.
        seconds_between: interval of the plain lines; the first and last steps are always shown.
    """

    def __init__(self, total_steps: int, first_step: int, console: Console, seconds_between: float = 10.0) -> None:
        self._total = total_steps
        self._first = first_step
        self._console = console
        self._between = seconds_between
        self._started = time.monotonic()
        self._shown = 0.0
        self._lost: list[str] = []
        self._bar = _Bar("step", total_steps, console if console.is_terminal else None, done=first_step)

    def __enter__(self) -> TrainingProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def step(self, step: int, loss: float, lr: float, grad_norm: float, tokens_per_second: float) -> None:
        """Show one finished step."""
        line = f"loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar.update(step, line):
            return
        now = time.monotonic()
        if now - self._shown >= self._between or step in (self._first + 1, self._total):
            self._shown = now
            left = (now - self._started) / max(1, step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total}  {line}  ETA {_clock(left)}")

    def say(self, text: str) -> None:
        """Print a line of its own: a validation result, a checkpoint, a warning."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def newly_lost(self) -> list[str]:
        """Return what could not be written to the standard streams, each problem once: what is said goes unseen."""
        new = [problem for problem in lost_outputs() if problem not in self._lost]
        self._lost += new
        return new


class AnswerProgress:
    """Shows how many answers of many are there, on standard error, so that standard output holds results alone.

    Args:
        total: answers that this process makes.
        shown: False shows nothing.
        seconds_between: interval of the plain lines where the output is no terminal.
    """

    def __init__(self, total: int, shown: bool = True, seconds_between: float = 30.0) -> None:
        self._total, self._shown, self._between = total, shown, seconds_between
        self._done = self._tokens = 0
        self._console = Console(stderr=True)
        self._began = self._said = time.monotonic()
        live = shown and self._console.is_terminal
        self._bar = _Bar("answers", total, self._console if live else None, transient=True)

    def __enter__(self) -> AnswerProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def answered(self, tokens: int) -> None:
        """Count an answer of so many tokens."""
        self._done += 1
        self._tokens += tokens
        now = time.monotonic()
        speed = f"{self._tokens / max(now - self._began, 1e-9):,.1f} tokens/s"
        if not self._bar.update(self._done, speed) and self._shown and now - self._said >= self._between:
            self._said = now
            left = (now - self._began) / self._done * (self._total - self._done)
            self._console.print(
                f"answers {self._done}/{self._total}  {speed}  ETA {_clock(left)}", markup=False, highlight=False
            )


@contextlib.contextmanager
def checking_rows(console: Console, seconds_between: float = 10.0) -> Iterator[Callable[[int, int], None]]:
    """Context with a function that shows how many rows of how many are checked; arguments as in `TrainingProgress`."""
    began = said = time.monotonic()
    bar = Progress(
        TextColumn("rows checked"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("ETA"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("")

    def show(done: int, of: int) -> None:
        nonlocal said
        bar.update(task, completed=done, total=of)
        now = time.monotonic()
        if not console.is_terminal and now - said >= seconds_between:
            said = now
            left = (now - began) / done * (of - done)
            console.print(f"rows checked {done:,}/{of:,}  ETA {_clock(left)}", markup=False, highlight=False)

    with bar:
        yield show


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
