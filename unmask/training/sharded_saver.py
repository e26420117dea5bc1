"""Checkpoints of several ranks: each writes its shards in the background, rank 0 commits.

Training goes on at once: weights and moments change in the optimizer's step alone, so a thread on every rank copies the
shards to host memory while the next step computes its gradients, and only the update waits for the copy. The thread
then has torch.distributed.checkpoint write the copy; when all ranks' shards are on the disk, rank 0 lists them in the
manifest and renames the folder, so that here too a `step_N` is whole or not there. The threads have a process group of
their own: they never take part in the training loop's collectives.
"""

from __future__ import annotations

import copy
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from unmask.config.results import CheckpointConfig
from unmask.distributed.ranks import Ranks, from_first
from unmask.errors import CheckpointError
from unmask.models.folders import SHARDED
from unmask.training.checkpoint import (
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
from unmask.training.sharded_write import disk_problem, write_shards

_LAST_WAIT = 60.0  # seconds that a failed run gives to a save under way


@dataclass
class _Underway:
    """A save that has begun.

    Attributes:
        step: steps made.
        temporary: the folder that becomes the checkpoint.
        state: content of state.json.
        own: files that this rank has written already.
        tensors: what is saved, sharing the run's memory; None once it is copied.
        ready: waits until the device has computed `tensors`.
        began: when, by `time.perf_counter`.
        pause: seconds that training was held up.
        copied: set when `tensors` may change.
        seconds: from the beginning until the checkpoint was complete.
    """

    step: int
    temporary: Path
    state: dict[str, Any]
    own: list[Path]
    tensors: dict[str, Any] | None
    ready: Callable[[], None]
    began: float
    pause: float = 0.0
    copied: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0


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
        self._network, self._optimizer = network, optimizer
        self._ranks = ranks
        self._background = Ranks(ranks.rank, ranks.size, dist.new_group(backend="gloo"))
        self._beside = _written_by(write_beside) if ranks.first else {}
        cuda = torch.cuda.is_available()
        # Kept over saves, with its memory: taking that anew costs more than the copy. On CUDA it has a stream of its
        # own, beside the one that computes.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
            )
        )
        self._thread: threading.Thread | None = None
        self._underway: _Underway | None = None
        self._complete: list[_Underway] = []
        self._problem: str | BaseException | None = None
        optimizer.register_step_pre_hook(self._hold)

    def save(self, step: int, state: Mapping[str, Any], last: bool) -> None:
        """Begin to save a step; all ranks call it. It waits for the save before, if that is still under way.

        The model may be used as soon as this returns, and may change in the optimizer's step.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        began = time.perf_counter()
        self.settle()
        temporary = Path(from_first(self._ranks, lambda: str(self._begin(step))))
        try:
            own = self._write_plain(temporary, last)
        except OSError as error:
            raise cannot_save(self._root / f"step_{step}", error) from error
        tensors = run_tensors(self._network.trained(), self._network.model, self._optimizer, self._network.meshes)
        save = _Underway(step, temporary, copy.deepcopy(dict(state)), own, tensors, _device_is_ready(), began)
        self._underway = save
        self._thread = threading.Thread(target=self._finish, args=(save,), name="unmask-save", daemon=True)
        self._thread.start()
        save.pause = time.perf_counter() - began

    def poll(self) -> list[dict[str, Any]]:
        """Return {step, folder, pause_seconds, seconds} of each save that has become complete since the last call.

        Raises:
            CheckpointError: it failed.
        """
        self._raise_problem()
        news = []
        while self._complete:
            save = self._complete.pop(0)
            times = {"pause_seconds": round(save.pause, 3), "seconds": round(save.seconds, 3)}
            news.append({"step": save.step, "folder": self._root / f"step_{save.step}", **times})
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

    def _hold(self, *_: Any) -> None:
        """Before an update: wait until the save under way has its copy of what the update changes."""
        save = self._underway
        if save is not None and not save.copied.is_set():
            began = time.perf_counter()
            save.copied.wait()
            save.pause += time.perf_counter() - began

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if isinstance(problem, str):
            raise CheckpointError(problem)
        if problem is not None:
            raise problem

    def _begin(self, step: int) -> Path:
        try:
            return begin_checkpoint(self._root, step)
        except OSError as error:
            raise cannot_save(self._root / f"step_{step}", error) from error

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

    def _finish(self, save: _Underway) -> None:
        """Copy, write, then commit; runs in a thread of its own on every rank."""
        try:
            staged = self._copy(save)
            problem = self._write_beside(save)
            # All ranks take part, whatever befell one: the others would wait for it.
            problem = write_shards(staged, save.temporary / SHARDED, self._background) or problem
            own = [*save.own, *sorted((save.temporary / SHARDED).glob(f"__{self._ranks.rank}_*"))]
            listing = None if problem else list_files(save.temporary, own)
            listings, problems = zip(*self._background.gather((listing, problem)), strict=True)
            found = {rank: text for rank, text in enumerate(problems) if text}
            said = [None]
            if self._ranks.first:
                said = [self._commit(save.step, save.temporary, listings, found)]
            said = self._background.gather(said[0])[0]
            if said is not None:
                self._problem = said
            else:
                self.newest = self._root / f"step_{save.step}"
                save.seconds = time.perf_counter() - save.began
                self._complete.append(save)
        except BaseException as error:  # shown by the main thread: here nobody would see it
            self._problem = error

    def _copy(self, save: _Underway) -> dict[str, Any]:
        assert save.tensors is not None
        try:
            save.ready()
            return self._stager.stage(save.tensors).result()  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            save.tensors = None
            save.copied.set()

    def _write_beside(self, save: _Underway) -> str | None:
        """Write what belongs to a checkpoint beside tensors, on rank 0; return what the disk said against it."""
        if not self._ranks.first:
            return None
        try:
            for name, content in self._beside.items():
                path = save.temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            write_state(save.temporary, save.step, save.state)
        except OSError as error:
            return f"rank 0: {disk_problem(error)}"
        return None

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


def _written_by(write: Callable[[Path], None]) -> dict[str, bytes]:
    """Return the content of the files that a function writes into a folder, by their paths in it."""
    with tempfile.TemporaryDirectory(prefix="unmask-beside-") as name:
        folder = Path(name)
        write(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _device_is_ready() -> Callable[[], None]:
    """Return what waits until a CUDA device has done what it was told so far: another stream may read then."""
    import torch

    if not torch.cuda.is_available():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
