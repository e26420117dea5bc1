"""Ctrl-C and SIGTERM as a request to stop after the current step; a second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from unmask.distributed.ranks import Ranks


class StopRequest:
    """Context in which SIGINT and SIGTERM set `name` instead of killing the process; leaving restores the handlers."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def agreed(self, ranks: Ranks) -> str | None:
        """Return the signal that any rank has received, the same on all of them; a collective."""
        own = 0 if self.name is None else int(signal.Signals[self.name])
        number = ranks.largest(own)
        return None if number == 0 else signal.Signals(number).name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.name = signal.Signals(number).name
