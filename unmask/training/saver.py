"""Saves checkpoints while training goes on: a thread on every rank writes its part, then rank 0 commits the whole.

Weights and moments change only in the optimizer's step, so the thread reads them while the next step computes its
gradients, and only the update waits: for the copy of CUDA tensors to the host, or until host tensors are written. When
all files are on the disk, rank 0 lists them in the manifest and renames the folder, so that a `step_N` is complete or
absent. On several ranks the threads have a process group of their own, apart from the training loop's collectives.

Tensors are safetensors: whole ones from one process; from several, each rank's parts as torch.distributed.checkpoint's
HuggingFaceStorageWriter writes them. Its consolidation zeroes tensors of shape (), fails on integers, which a
checkpoint's vision tower may hold, and writes no `format`; so whole files are written from the parts by our own writer.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from unmask.config.results import CheckpointConfig
from unmask.distributed.ranks import from_first
from unmask.distributed.runtime import Runtime
from unmask.distributed.shard import disk_problem, write_parts
from unmask.errors import CheckpointError
from unmask.models.folders import ADAPTER_WEIGHTS, SHARDED
from unmask.models.weights import passthrough_tensors, read_tensors, save_weights, write_tensors
from unmask.places import naming
from unmask.training.checkpoint import begin_checkpoint, cannot_save, commit_checkpoint, list_files, prune, write_state
from unmask.training.network import OPTIMIZER, Network, gather_adapter, moments, weights

_LAST_WAIT = 60.0  # seconds that a failed run waits for a save under way
_PASSTHROUGH = "passthrough.safetensors"  # file beside the ranks' parts (`FileLayout.passthrough`)


@dataclass
class _Save:
    """A save under way.

    Attributes:
        temporary: the folder that becomes the checkpoint.
        consolidate: write the weights as a plain Hugging Face folder.
        tensors: `weights` and `moments`, sharing the run's memory.
        ready: waits until the device has computed `tensors`.
        pause: seconds that training was held up.
        released: set when `tensors` may change.
        seconds: from start to commit.
    """

    step: int
    temporary: Path
    state: dict[str, Any]
    consolidate: bool
    tensors: dict[str, dict[str, Tensor]]
    adapter: dict[str, Tensor]
    ready: Callable[[], None]
    began: float
    pause: float = 0.0
    released: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0


class Saver:
    """Saves a run's network, optimizer and state as checkpoints, in the background.

    Args:
        network: what is saved; with an adapter, the adapter alone.
        runtime: where the network runs, and the ranks that share it.
        files: content of each checkpoint's files other than tensors, by path in it, on rank 0 (`network.other_files`).
        newest: the checkpoint that the run resumes from; updated to the newest complete one.
    """

    def __init__(
        self,
        root: Path,
        section: CheckpointConfig,
        network: Network,
        runtime: Runtime,
        files: Mapping[str, bytes],
        newest: Path | None,
    ) -> None:
        self.newest = newest
        self._root, self._section, self._network = root, section, network
        self._ranks, self._files, self._device = runtime.ranks, files, runtime.device
        self._background = runtime.ranks.apart()
        cuda = any(parameter.is_cuda for parameter in network.model.parameters())
        self._stager = host_copies() if cuda else None
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._thread: threading.Thread | None = None
        self._underway: _Save | None = None
        self._complete: list[_Save] = []
        self._problem: str | BaseException | None = None
        network.optimizer.register_step_pre_hook(self._hold)

    def save(self, step: int, state: Mapping[str, Any], last: bool) -> None:
        """Begin to save a step; all ranks call it. Waits for an earlier save still under way.

        The model may be used as soon as this returns, and may change in the optimizer's step.

        Args:
            state: data position and identity, JSON-able.
            last: this is the run's last step.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        began = time.perf_counter()
        self.wait()
        temporary = from_first(self._ranks, lambda: begin_checkpoint(self._root, step))
        when = self._section.save_consolidated
        consolidate = self._ranks.size == 1 or when == "every" or (when == "final" and last)
        tensors = {"weights": weights(self._network), "moments": moments(self._network)}
        adapter, state = gather_adapter(self._network), copy.deepcopy(dict(state))
        ready = _device_is_ready(self._device)
        save = _Save(step, temporary, state, consolidate, tensors, adapter, ready, began)
        self._underway = save
        self._thread = threading.Thread(target=self._finish, args=(save,), name="unmask-save", daemon=True)
        self._thread.start()
        save.pause = time.perf_counter() - began

    def poll(self) -> list[dict[str, Any]]:
        """Return {step, folder, pause_seconds, seconds} of each save completed since the last call.

        Raises:
            CheckpointError: a save failed.
        """
        self._raise_problem()
        news = []
        while self._complete:
            save = self._complete.pop(0)
            times = {"pause_seconds": round(save.pause, 3), "seconds": round(save.seconds, 3)}
            news.append({"step": save.step, "folder": self._root / f"step_{save.step}", **times})
        return news

    def wait(self) -> None:
        """Wait for a save under way; raises CheckpointError when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_problem()

    def wait_briefly(self) -> None:
        """Wait up to `_LAST_WAIT` seconds for a save under way, when a run fails; raises nothing."""
        if self._thread is not None:
            self._thread.join(_LAST_WAIT)

    def _hold(self, *_: Any) -> None:
        """Optimizer pre-hook: delay the update until the save under way has read the tensors that it changes."""
        save = self._underway
        if save is not None and not save.released.is_set():
            began = time.perf_counter()
            save.released.wait()
            save.pause += time.perf_counter() - began

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if isinstance(problem, str):
            raise CheckpointError(problem)
        if problem is not None:
            raise problem

    def _finish(self, save: _Save) -> None:
        """Write, then commit; runs in a thread of its own on every rank."""
        try:
            if self._device.type == "cuda":
                # A thread starts with device 0; its first copy would make a context there for every rank.
                torch.cuda.set_device(self._device)
            problem, listing = self._write(save), {}
            if problem is None:
                problem = self._attempt(lambda: listing.update(list_files(save.temporary, self._parts(save))))
            # Collective: all ranks take part, even if one has failed.
            listings, problems = zip(*self._background.gather_results((listing, problem)), strict=True)
            if self._ranks.first:
                problem = self._commit(save, listings, next(filter(None, problems), None))
            problem = self._background.gather_results(problem)[0]
            if problem is not None:
                self._problem = problem
            else:
                self.newest = self._root / f"step_{save.step}"
                save.seconds = time.perf_counter() - save.began
                self._complete.append(save)
        except BaseException as error:  # raised by the main thread
            self._problem = error

    def _write(self, save: _Save) -> str | None:
        """Write this rank's files; return the disk's error, if any."""
        folder, ranks, problem = save.temporary, self._background, None
        try:
            save.ready()
            tensors: Any = save.tensors
            if self._stager is not None:
                with torch.cuda.stream(self._stream):  # not the one that training computes in
                    tensors = self._stager.stage(tensors)
                save.released.set()
            if ranks.first:
                problem = self._attempt(lambda: self._write_small(save))
            if ranks.size == 1:
                return problem or self._attempt(lambda: self._write_whole(tensors, folder))
            # All ranks take part in each.
            for name, place in (("moments", folder / OPTIMIZER), ("weights", folder)):
                if tensors[name]:
                    problem = write_parts(tensors[name], place / SHARDED, ranks) or problem
        finally:
            save.tensors = {}
            save.released.set()
        if ranks.first and problem is None and not save.adapter:
            problem = self._attempt(lambda: self._complete_weights(save))
        return problem

    def _write_small(self, save: _Save) -> None:
        for name, content in self._files.items():
            path = save.temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path):
                path.write_bytes(content)
        if save.adapter:
            write_tensors(save.adapter, save.temporary / ADAPTER_WEIGHTS)
        write_state(save.temporary, save.step, save.state)

    def _write_whole(self, tensors: Mapping[str, dict[str, Tensor]], folder: Path) -> None:
        (folder / OPTIMIZER).mkdir()
        save_weights(tensors["moments"].items(), folder / OPTIMIZER)
        if tensors["weights"]:
            save_weights(chain(tensors["weights"].items(), self._passthrough()), folder)

    def _complete_weights(self, save: _Save) -> None:
        """Add passthrough tensors to all ranks' parts, or consolidate both into a plain folder."""
        folder = save.temporary
        if save.consolidate:
            save_weights(chain(read_tensors(folder), self._passthrough()), folder)
            shutil.rmtree(folder / SHARDED)
        elif passthrough := dict(self._passthrough()):
            write_tensors(passthrough, folder / SHARDED / _PASSTHROUGH)

    def _passthrough(self) -> Any:
        plan = self._network.plan
        return passthrough_tensors(plan.folder, plan.family.files)

    def _parts(self, save: _Save) -> list[Path]:
        """Return this rank's part files that stay in the checkpoint."""
        folders = [save.temporary / OPTIMIZER, *([] if save.consolidate else [save.temporary])]
        return [path for folder in folders for path in (folder / SHARDED).glob(f"shard-{self._ranks.rank + 1:05d}-*")]

    def _attempt(self, write: Callable[[], object]) -> str | None:
        """Call `write`; return the disk's error as a message, None without one."""
        try:
            write()
        except (OSError, SafetensorError) as error:  # safetensors wraps OSErrors
            return disk_problem(self._ranks, self._ranks.rank, error)
        return None

    def _commit(self, save: _Save, listings: Any, problem: str | None) -> str | None:
        """Move a complete checkpoint into place, or remove it after a problem; return the message, if any."""

        def commit() -> None:
            listing = {name: entry for listing in listings for name, entry in listing.items()}
            final = commit_checkpoint(self._root, save.step, save.temporary, listing)
            prune(self._root, self._section.max_recent_checkpoints, final)

        problem = problem or self._attempt(commit)
        if problem is None:
            return None
        shutil.rmtree(save.temporary, ignore_errors=True)
        return str(cannot_save(self._root / f"step_{save.step}", problem))


def host_copies() -> DefaultStager:
    """Return what copies CUDA tensors to the host, in the thread and the stream of its caller.

    It keeps its pinned memory for the next save, since to allocate it costs more than to copy. A thread of its own, as
    it has by default, would start on device 0.
    """
    return DefaultStager(StagingOptions(use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False))


def _device_is_ready(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the CUDA work queued so far, so that another stream may read its results."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
