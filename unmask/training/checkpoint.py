"""Checkpoints that are whole or not there: written beside, then renamed; read only after every byte is checked.

`step_N/` is a Hugging Face folder (the model as it is at step N) with the optimizer's moments, the data position and
the run's configuration beside the weights. `manifest.json` is written last and lists every file's size and CRC-32.
`saver` and `network` decide what is in the other files.

state.json also holds the best evaluation up to its step. A resumed run goes on comparing with it, and makes the link
`best` from it, in case the run was killed between saving and linking.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unmask.errors import CheckpointError, DataError
from unmask.models.manifest import MANIFEST, STATE, crc32, find_damage, read_manifest, unlisted
from unmask.parsing import parse_json
from unmask.places import naming, read_bytes, remove

if TYPE_CHECKING:  # this module needs no torch
    from unmask.distributed.ranks import Ranks

T = TypeVar("T")

LATEST, BEST = "latest", "best"  # links to checkpoints
_STEP = re.compile(r"step_(\d+)")
SEEN_WITHIN = 60.0  # seconds in which a network file system shows what another machine has written
_FORMAT = 2  # 1 had the moments in optimizer.safetensors, or pickled shards of several ranks
# Remedies, at the end of a message.
_OTHER_VERSION = (
    "; resume it with the version that wrote it, or train on from its weights (model.pretrained_model_name_or_path)"
)
_CHANGED_DATA = "; put them back, or set checkpoint.accept_changed_data: true to go on with them as they are"

# What may be raised where JSON has another shape than it is read for.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)

# A checkpoint's data position → that position in the data as they are now, and how they have changed since, if they
# have. DataError where the data have no such position any more, an error of `_MALFORMED` where it has another shape.
Reconcile = Callable[[Mapping[str, Any]], tuple[dict[str, Any], str | None]]


def as_saved(position: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a data position as it was saved, without a look at the data."""
    return dict(position), None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from.

    Attributes:
        state: the content of its state.json.
        refused: one line for each newer checkpoint that could not be used, naming it and why.
        changed_data: how the data have changed since, where that does not matter or is accepted.
    """

    folder: Path
    state: dict[str, Any]
    refused: tuple[str, ...]
    changed_data: str | None = None


def begin_checkpoint(root: Path, step: int) -> Path:
    """Return a new empty folder beside the place of `step_N`; raises CheckpointError."""
    temporary = root / f".step_{step}.{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
    except OSError as error:
        raise cannot_save(root / f"step_{step}", error.strerror) from error
    return temporary


def write_state(temporary: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write state.json; raises OSError."""
    with naming(temporary / STATE):
        (temporary / STATE).write_text(json.dumps({"format": _FORMAT, "step": step, **state}, indent=1) + "\n")


def list_files(temporary: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    """Flush files to the disk and return [size, CRC-32] of each by its path within the folder; raises OSError."""
    listing = {}
    for path in sorted(files):
        with naming(path):
            listing[str(path.relative_to(temporary))] = [path.stat().st_size, crc32(path)]
        _to_disk(path)
    return listing


def commit_checkpoint(root: Path, step: int, temporary: Path, listing: Mapping[str, list[int]]) -> Path:
    """Write the manifest, rename a complete folder to `step_N` and point `latest` at it; raises OSError.

    `listing` has the entries of `list_files` that are known already; the other files are listed here.
    """
    final = root / f"step_{step}"
    _await_files(temporary, listing)
    files = [path for path in temporary.rglob("*") if path.is_file()]
    rest = list_files(temporary, [path for path in files if str(path.relative_to(temporary)) not in listing])
    manifest = {"format": _FORMAT, "files": dict(sorted({**listing, **rest}.items()))}
    with naming(temporary / MANIFEST):
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (temporary / MANIFEST, temporary):
        _to_disk(path)
    if final.exists():  # one that this run refused; moved aside in one step, and removed by `prune`
        final.rename(root / f".step_{step}.{os.getpid()}.old.part")
    temporary.rename(final)
    _point_latest(root, final.name)
    best_step = (parse_json(read_bytes(final / STATE), strict=False).get("best") or {}).get("step")
    if best_step == step:
        point(root, BEST, final.name)
    _to_disk(root)  # the names too, before `prune` may remove older checkpoints
    return final


def _await_files(folder: Path, listing: Mapping[str, list[int]]) -> None:
    """Return when files are there with their sizes as other ranks have listed them; raises OSError if they never are.

    Without that a folder that the machines do not share would be a torn checkpoint, found out by the next resume.
    """
    until = time.monotonic() + SEEN_WITHIN
    while missing := [name for name, (size, _) in listing.items() if not _has_size(folder / name, size)]:
        if time.monotonic() > until:
            reason = "another process has written it, and it is not here in that size; processes must share the folder"
            raise OSError(errno.ENOENT, reason, str(folder / missing[0]))
        time.sleep(0.1)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def cannot_save(final: Path, reason: str | None) -> CheckpointError:
    """Return the error that says why a checkpoint is not there."""
    return CheckpointError(
        f"{final}: the checkpoint could not be saved ({reason}); nothing half-written was left and older "
        "checkpoints are untouched. Free some space or change checkpoint.checkpoint_dir, then run again to resume"
    )


def prune(root: Path, keep: int | None, saved: Path) -> None:
    """Remove what failed saves left behind, and all but the best and the `keep` newest checkpoints up to `saved`.

    Checkpoints of later steps are ones that this run refused. They neither count nor are touched: if they counted, the
    only ones that it can resume from would be removed for them.
    """
    remove_parts(root)
    newest_first, best_folder = checkpoints(root), (root / BEST).resolve()
    for folder in [] if keep is None else newest_first[newest_first.index(saved) + keep :]:
        if folder.resolve() == best_folder:
            continue
        doomed = folder.with_name(f".{folder.name}.{os.getpid()}.part")  # a kill half-way must not leave a torn step_N
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_parts(root: Path) -> None:
    """Remove what killed or failed saves left in a run directory, whose lock the caller holds."""
    for pattern in (".step_*.part", f".{LATEST}.*", f".{BEST}.*"):
        for leftover in root.glob(pattern):
            remove(leftover)


def checkpoints(root: Path) -> list[Path]:
    """Return the `step_N` folders of a run, newest first, whole or not."""
    steps = [(int(match[1]), path) for path in root.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def find_checkpoint(
    root: Path, identity: Mapping[str, Any], reconcile: Reconcile = as_saved, ranks: Ranks | None = None
) -> Checkpoint | None:
    """Return the newest checkpoint that is whole and has this `identity` in its state; None when the run has none yet.

    `reconcile` compares its data position with the data, and returns it brought up to date. With several `ranks` a
    collective: they divide the files that are checked, and rank 0 does the rest.

    Raises:
        CheckpointError: there are checkpoints, but none can be used; each is named with its reason.
    """
    refused = []
    for folder in _from_first(ranks, lambda: checkpoints(root)):
        try:
            verify(folder, ranks)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        problem, state, changed_data = _from_first(ranks, lambda each=folder: _usable(each, identity, reconcile))
        if problem is None:
            return Checkpoint(folder, state, tuple(refused), changed_data)
        refused.append(problem)
    if refused:
        reasons = "; ".join(refused)
        for remedy in (_OTHER_VERSION, _CHANGED_DATA):  # each is said once, with the last reason that has it
            reasons = reasons.replace(remedy, "", reasons.count(remedy) - 1)
        raise CheckpointError(
            f"{root} holds no checkpoint that this run can resume from: {reasons}. "
            "Set checkpoint.checkpoint_dir to a new folder, or move these away to start from the beginning"
        )
    return None


def _from_first(ranks: Ranks | None, function: Callable[[], T]) -> T:
    """Return what a function returns on rank 0, which alone calls it, on every rank; it must raise nothing."""
    if ranks is None:
        return function()
    return ranks.gather_results(function() if ranks.first else None)[0]


def _usable(
    folder: Path, identity: Mapping[str, Any], reconcile: Reconcile
) -> tuple[str | None, dict[str, Any], str | None]:
    """Return why a run cannot resume from a whole checkpoint (None if it can), its state, and how the data changed."""
    try:
        state = _read_state(folder)
        for name, value in identity.items():
            if (stored := state["identity"].get(name)) != value:
                what = f"its {name} is {_short(stored)}, this run's is {_short(value)}"
                return f"{folder.name} is foreign: {what}", {}, None
        position, changed_data = reconcile(state["loader"])
    except CheckpointError as error:
        return str(error), {}, None
    except _MALFORMED:
        return f"{folder.name} is torn: the data position in its {STATE} cannot be read", {}, None
    except DataError as error:
        return f"{folder.name} is foreign: {error}{_CHANGED_DATA}", {}, None
    return None, {**state, "loader": position}, changed_data


def newest_data(root: Path) -> str | None:
    """Return the fingerprint of the data that a run's newest checkpoint was trained on, None where that is unknown."""
    try:
        return _read_state(checkpoints(root)[0])["loader"]["order"]["fingerprint"]
    except (IndexError, KeyError, TypeError, CheckpointError):
        return None


def verify(folder: Path, ranks: Ranks | None = None) -> None:
    """Check every file of a checkpoint against its manifest; with several ranks a collective that divides the files.

    Raises:
        CheckpointError: naming the checkpoint and a file that is missing, too short or changed.
    """
    problem, files = _from_first(ranks, lambda: _listed(folder))
    if problem is None:
        part, of = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        largest_first = sorted(files, key=lambda name: (-files[name][0], name))
        share = set(largest_first[part::of])  # about as many bytes for each rank
        problem = find_damage(folder, {name: entry for name, entry in files.items() if name in share})
        if ranks is not None:
            problem = next(filter(None, ranks.gather_results(problem)), None)
    if problem is not None:
        raise CheckpointError(f"{folder.name} {problem}")


def _listed(folder: Path) -> tuple[str | None, dict[str, tuple[int, int]]]:
    """Return what is wrong with a manifest, None if nothing is, and the files that it lists."""
    try:
        version, files = read_manifest(folder)
        if STATE not in files:
            raise KeyError(STATE)
    except (OSError, *_MALFORMED):
        return f"is torn: its {MANIFEST} is missing or unreadable", {}
    if version != _FORMAT:
        return f"has format {_short(version)}, this version reads {_FORMAT}{_OTHER_VERSION}", {}
    return unlisted(folder, files) or unlisted(folder, files, "optimizer/"), files


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = parse_json(read_bytes(folder / STATE), strict=False)
        if type(state["step"]) is not int or folder.name != f"step_{state['step']}":
            raise ValueError(state["step"])
        _check_best(state.get("best"))
        return {**state, "identity": dict(state["identity"]), "loader": dict(state["loader"])}
    except (OSError, *_MALFORMED):
        raise CheckpointError(f"{folder.name} is torn: its {STATE} is missing or unreadable") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _point_latest(root: Path, name: str) -> None:
    point(root, LATEST, name)


def point(root: Path, link: str, name: str) -> None:
    """Let a link in a run directory lead to a checkpoint; atomic."""
    temporary = root / f".{link}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, root / link)


def _to_disk(path: Path) -> None:
    """Return when a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Metric:
    """A number that compares checkpoints: its event and field in metrics.jsonl, and whether larger is better."""

    event: str
    field: str
    larger: bool


# checkpoint.best_metric → where it is reported; its keys are those of `unmask.config.results.METRICS`.
METRICS: dict[str, Metric] = {
    "validation_loss": Metric("validation", "loss", larger=False),
    "exact_match": Metric("exact_match", "exact_match", larger=True),
}


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its number by a key of METRICS, and the step whose checkpoint it is."""

    metric: str
    value: float
    step: int


def better(metric: str | None, best: Best | None, measured: Mapping[str, Mapping[str, Any]], step: int) -> Best | None:
    """Return this step's evaluation if it beats the best so far; None if it does not, or did not measure `metric`.

    Equal is not better. The model before the first step is no candidate: it has no checkpoint.

    Args:
        metric: a key of METRICS; None compares nothing.
        measured: name of an event of metrics.jsonl → its fields.
    """
    if metric is None or step == 0:
        return None
    known = METRICS[metric]
    value = measured.get(known.event, {}).get(known.field)
    if value is None or not math.isfinite(value):
        return None
    if best is not None and (value <= best.value if known.larger else value >= best.value):
        return None
    return Best(metric, float(value), step)


def _check_best(best: Any) -> None:
    """Raise an error of `_MALFORMED` where a state's `best` is neither None nor has the fields of `Best`."""
    if best is not None and not (
        isinstance(best["metric"], str) and math.isfinite(best["value"]) and type(best["step"]) is int
    ):
        raise ValueError(best)


def stored_best(state: Mapping[str, Any], metric: str | None) -> Best | None:
    """Return the best evaluation in a checkpoint's state; None where it has none, or one by another metric."""
    best = state.get("best")
    return Best(best["metric"], best["value"], best["step"]) if best and best["metric"] == metric else None
