"""The exceptions a user can meet. Each message names what is wrong, where, and what to do about it.

The command line prints the message in one line and exits with `exit_status`; programmers catch the types.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2000  # characters of a message


class UnmaskError(Exception):
    """Root of every error raised on purpose by this package."""

    exit_status = 2

    def __init__(self, message: str = "") -> None:
        # What is wrong stands at the start, the remedy at the end, a value of any size between them.
        # A file's name, and what a stranger wrote, can hold line breaks and what a terminal obeys.
        super().__init__(_shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in _shortened(message))))


class ConfigError(UnmaskError):
    """A configuration field, flag or combination that cannot be honoured."""


class FieldError(ConfigError):
    """A value refused by its own section; the section's reader adds the dotted path in front of `field`.

    Args:
        field: name of the field within its section.
        problem: what is wrong and what would be right, as the end of a sentence that starts with the field.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, str]]:  # from a worker process
        return type(self), (self.field, self.problem)


class DataError(UnmaskError):
    """A data source, row or chat template that cannot be used for training."""


class ModelError(UnmaskError):
    """A model folder, configuration or weight file that cannot be used, or an input the model does not take."""


class CheckpointError(UnmaskError):
    """A training checkpoint that is torn, foreign or cannot be written."""


class SamplingError(UnmaskError):
    """Sampler settings or prompts that cannot be honoured."""


class MissingDependencyError(UnmaskError):
    """An optional package is needed for what was asked; the message gives the install command."""


class TrainingError(UnmaskError):
    """Training had to stop, for example at a loss that is not finite. Not the fault of the input as given."""

    exit_status = 1


def _shortened(message: str) -> str:
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 500]} … {message[-490:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether Python, a device or the allocator on the CPU, which has no exception of its own, had no memory."""
    said = str(error)
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or (
        "DefaultCPUAllocator" in said and ("can't allocate memory" in said or "not enough memory" in said)
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the choice spelt most like `word`, or "" when none is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choice_problem(value: object, choices: Iterable[object]) -> str:
    """Say that `value` is none of `choices`, naming them all and the nearest spelling."""
    names = [str(choice) for choice in choices]
    return f"{value!r} is not one of {', '.join(names)}{nearest(str(value), names)}"
