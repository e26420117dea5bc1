"""The command line. Parsing needs nothing heavy; each command imports what it uses when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import unmask
from unmask.commands import chat, doctor, eval, export, generate, plot, prep, quickstart, report, train
from unmask.config.flags import spellings
from unmask.distributed.processes import end_with_launcher, leave_status, several_processes
from unmask.errors import ConfigError, UnmaskError, is_out_of_memory, nearest
from unmask.streams import OutputLost, need_output, standard_streams

# In the order of `unmask --help`.
COMMANDS = (quickstart, train, generate, chat, eval, prep, plot, report, export, doctor)

# Seconds that a process gives itself to leave the process group.
_END, _END_OF_FAILED = 60.0, 5.0

# The variable that torch's allocators read, and its older names.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, or 2 after one line that says what is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Read by OpenMP when torch loads: threads that spin while they wait make two-thread matmuls up to ten times slower
    # as soon as another process wants a core; sleeping ones lose a few per cent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Read by torch's CUDA allocator: segments that grow hold batches of ever other lengths without gaps between them.
    if not any(os.environ.get(name) for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    end_with_launcher()
    with standard_streams():
        status = _run(build_parser(), words)
    if "WORLD_SIZE" in os.environ:  # one of several processes: nobody else tells the launcher how it ended
        leave_status(status)
        _leave_the_others(status)
    return status


def _leave_the_others(status: int) -> None:
    """Leave the process group, and the process at once where that hangs: others, or their machine, may be gone."""
    if "unmask.distributed.ranks" not in sys.modules:  # nothing was joined
        return
    from unmask.distributed.ranks import leave

    if not leave(_END if status == 0 else _END_OF_FAILED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(parser: argparse.ArgumentParser, words: list[str]) -> int:
    need_output(True)
    try:
        try:
            return _command(parser, words)
        finally:
            sys.stdout.flush()  # now, while it can be reported
    except OutputLost as lost:
        return 0 if lost.reader_left else _fail(f"{lost}; what was printed is not complete", 2)


def _command(parser: argparse.ArgumentParser, words: list[str]) -> int:
    try:
        for word in words:
            if word.startswith("-") and word.endswith("=--"):  # argparse takes it for an empty list
                raise ConfigError(f"{word[:-3]}: `--` is no value; leave the flag out, or give it one")
        arguments, rest = parser.parse_known_args(words)
        need_output(_only_prints(arguments))
        if rest and not getattr(arguments, "takes_overrides", False):
            meant = nearest(rest[0].partition("=")[0], spellings(arguments.parser)) if rest[0].startswith("-") else ""
            raise ConfigError(f"unknown argument {rest[0]}{meant}; see `unmask {arguments.command} --help`")
        arguments.overrides, arguments.words = rest, words
        return arguments.run(arguments) or 0
    except UnmaskError as error:
        return _fail(str(error), error.exit_status)
    except OSError as error:  # a place of the user's that no part of the program expected to fail
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{place}{error.strerror or error}", 2)
    except KeyboardInterrupt:
        print("unmask: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if is_out_of_memory(error):
            said = " ".join(str(error).split())[:200]
            return _fail(f"memory ran out ({said}); take a smaller model, batch or length, or a larger machine", 1)
        if not several_processes() or isinstance(error, OutputLost):
            raise
        from unmask.distributed.failures import report_failure

        return report_failure(error)


def _only_prints(arguments: argparse.Namespace) -> bool:
    """Say whether all that a command gives is on standard output; others work on without it."""
    if arguments.command == "generate":
        return arguments.output is None and arguments.trace is None
    return arguments.command in ("chat", "doctor") or getattr(arguments, "dry_run", False)


def _fail(message: str, status: int) -> int:
    """Print an error in one line; of several processes that have the same one, one does."""
    if not several_processes():
        print(f"unmask: error: {message}", file=sys.stderr)
        return status
    from unmask.distributed.failures import report

    return report(message, status)


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with its mistakes reported as ours are: in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing and leaving."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="unmask", description="Fine-tune, evaluate and run diffusion language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"unmask {unmask.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
