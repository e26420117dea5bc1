"""What an examination finds: one line each, with a level and a remedy, and the exit status that they amount to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: `ok`; `note`, worth knowing or not checked; `warning`, works worse than it could or may fail; `error`,
            will fail or compute something wrong.
        what: what was found, in one line.
        remedy: what to do about it, as the end of that line; "" where there is nothing to do, or `what` says it.
    """

    level: Level
    what: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """What was found and its remedy, in one line."""
        return " ".join(f"{self.what}; {self.remedy}".split() if self.remedy else self.what.split())


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 2 if there is an error among findings, else 1 if there is a warning, else 0."""
    return max((max(0, LEVELS.index(finding.level) - 1) for finding in findings), default=0)
