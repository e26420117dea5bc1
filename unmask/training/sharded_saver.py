"""Checkpoints of several ranks: each writes its shards in the background, rank 0 commits.

Training goes on as soon as torch.distributed.checkpoint has copied the shards to host memory. A thread on every rank
waits until they are on the disk; when all are, rank 0 lists them in the manifest and renames the folder, so that here
too a `step_N` is whole or not there. The thread has a process group of its own: it never takes part in the training
loop's collectives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from unmask.distributed.ranks import Ranks, from_first
from unmask.errors import CheckpointError
from unmask.models.folders import SHARDED
from unmask.training.checkpoint import (
    CheckpointConfig,
    begin_checkpoint,
    cannot_save,
    commit_checkpoint,
    drop_checkpoint,
    list_files,
    prune,
    write_state,
)
from unmask.training.sharded_model import SharedNetwork
from unmask.training.sharded_plain import write_carried, write_plain
from unmask.training.sharded_state import run_tensors

_LAST_WAIT = 60.0  # seconds that a failed run gives to a save under way
# How torch.save, whose writer drops the error of the system, reports that bytes did not reach their file.
_UNWRITTEN = ("inline_container", "PytorchStreamWriter")


class ShardedSaver:
    """Saves what several ranks hold.

    Args:
        root: the run directory, the same for all ranks.
        section: the `checkpoint` section.
        network, optimizer: what is saved; with an adapter, the adapter alone.
        ranks: all of them.
        write_beside: writes what belongs to a checkpoint beside weights: configuration and tokenizer.
        newest: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        root: Path,
        section: CheckpointConfig,
        network: SharedNetwork,
        optimizer: Optimizer,
        ranks: Ranks,
        write_beside: Callable[[Path], None],
        newest: Path | None,
    ) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.newest = newest
        self._root, self._section = root, section
        self._network, self._optimizer, self._write_beside = network, optimizer, write_beside
        self._ranks = ranks
        self._background = Ranks(ranks.rank, ranks.size, dist.new_group(backend="gloo"))
        cuda = torch.cuda.is_available()
        # Kept over saves, with its memory: taking that anew costs more than the copy.
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._thread: threading.Thread | None = None
        self._news: list[dict[str, Any]] = []
        self._problem: str | BaseException | None = None

    def save(self, step: int, state: Mapping[str, Any], last: bool) -> None:
        """Begin to save a step; all ranks call it. It waits for the save before, if that is still under way.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        from torch.distributed.checkpoint import async_save

        self.settle()
        began = time.perf_counter()
        temporary = Path(from_first(self._ranks, lambda: str(self._begin(step, state))))
        try:
            own = self._write_plain(temporary, last)
            tensors = run_tensors(self._network.trained(), self._network.model, self._optimizer, self._network.meshes)
            future = async_save(
                tensors,
                checkpoint_id=temporary / SHARDED,
                process_group=self._background.group,
                async_stager=self._stager,
            )
        except OSError as error:
            raise cannot_save(self._root / f"step_{step}", error) from error
        pause = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._finish, args=(step, temporary, own, future, began, pause), name="unmask-save", daemon=True
        )
        self._thread.start()

    def poll(self) -> list[dict[str, Any]]:
        """Return {step, folder, pause_seconds, seconds} of each save that has become complete since the last call.

        Raises:
            CheckpointError: it failed.
        """
        self._raise_problem()
        news, self._news = self._news, []
        return news

    def abandon(self) -> None:
        """Let a save under way come to its end, where the other ranks live to see it, whatever ended the run."""
        if self._thread is not None:
            self._thread.join(_LAST_WAIT)

    def settle(self) -> None:
        """Wait for a save under way; raises CheckpointError when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_problem()

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if isinstance(problem, str):
            raise CheckpointError(problem)
        if problem is not None:
            raise problem

    def _begin(self, step: int, state: Mapping[str, Any]) -> Path:
        temporary = begin_checkpoint(self._root, step)
        try:
            self._write_beside(temporary)
            write_state(temporary, step, state)
        except OSError as error:
            drop_checkpoint(temporary)
            raise cannot_save(self._root / f"step_{step}", error) from error
        return temporary

    def _write_plain(self, folder: Path, last: bool) -> list[Path]:
        """Write what other tools read, where it is wanted; return the files that this rank has written."""
        if self._network.adapter is not None:
            self._network.gather_adapter()
            if self._ranks.first:
                self._network.write_adapter(folder)
        elif self._section.save_consolidated == "every" or (self._section.save_consolidated == "final" and last):
            return write_plain(self._network, self._ranks, folder)
        elif self._ranks.first:
            write_carried(self._network, folder)
        return []

    def _finish(self, step: int, temporary: Path, own: list[Path], future: Any, began: float, pause: float) -> None:
        """Wait for the shards, then commit; runs in a thread of its own on every rank."""
        final = self._root / f"step_{step}"
        try:
            problem = _problem_of(future)
            own += sorted((temporary / SHARDED).glob(f"__{self._ranks.rank}_*"))
            listing = None if problem else list_files(temporary, own)
            listings, problems = zip(*self._background.gather((listing, problem)), strict=True)
            found = {rank: text for rank, text in enumerate(problems) if text}
            said = [None]
            if self._ranks.first:
                said = [self._commit(step, temporary, listings, found)]
            said = self._background.gather(said[0])[0]
            if said is not None:
                self._problem = said
            else:
                self.newest = final
                seconds = round(time.perf_counter() - began, 3)
                self._news.append({"step": step, "folder": final, "pause_seconds": round(pause, 3), "seconds": seconds})
        except BaseException as error:  # shown by the main thread: here nobody would see it
            self._problem = error

    def _commit(self, step: int, temporary: Path, listings: Any, problems: Mapping[int, str]) -> str | None:
        """Put a complete checkpoint into its place; return what went wrong, if anything did."""
        final = self._root / f"step_{step}"
        try:
            if problems:
                raise cannot_save(final, OSError(0, problems[min(problems)]))
            written = {name: entry for listing in listings for name, entry in listing.items()}
            rest = [path for path in temporary.rglob("*") if path.is_file()]
            others = [path for path in rest if str(path.relative_to(temporary)) not in written]
            commit_checkpoint(self._root, step, temporary, {**written, **list_files(temporary, others)})
            prune(self._root, self._section.max_recent_checkpoints, final)
        except OSError as error:
            drop_checkpoint(temporary)
            return str(cannot_save(final, error))
        except CheckpointError as error:
            drop_checkpoint(temporary)
            return str(error)
        return None


def _problem_of(future: Any) -> str | None:
    """Wait for a save's shards, which fail on all ranks or on none; return what the disk said against it, and where."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        future.result()
    except CheckpointException as error:
        return next(f"rank {rank}: {_disk_problem(cause)}" for rank, (cause, _) in error.failures.items())
    return None


def _disk_problem(error: BaseException) -> str:
    """Say what a failed write means; raise what is no failed write."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _UNWRITTEN):
        return "a file could not be written whole, so the disk is full or a limit is reached"
    raise error
