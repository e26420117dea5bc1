"""A run's tensors in torch.distributed.checkpoint's format, each under one name whatever ranks hold of it.

`model/<state-dict key>` and `optimizer/<parameter>/<moment>` name whole tensors; a rank brings its parts of them. So a
checkpoint of any number of ranks is read by any other number, one process without a process group included.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.distributed.mesh import Meshes
from unmask.errors import CheckpointError
from unmask.models.folders import SHARDED
from unmask.models.sharded_folder import MODEL, load_alone, stored_sizes
from unmask.training.optimizer_state import FILE

_OPTIMIZER = "optimizer/"


def run_tensors(
    trained: Iterable[tuple[str, Tensor]], model: nn.Module, optimizer: Optimizer, meshes: Meshes | None
) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, sharing the run's memory.

    Args:
        trained: (state-dict key, tensor over the whole network) of what is saved of the network.
        model, optimizer: the run's.
        meshes: the arrangement of ranks; None on one process.
    """
    tensors = {MODEL + name: tensor for name, tensor in trained}
    for name, parameter in model.named_parameters():
        for kind, moment in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{name}/{kind}"] = _view(name, moment, model, meshes)
    return tensors


def _view(name: str, tensor: Tensor, model: nn.Module, meshes: Meshes | None) -> Tensor:
    if meshes is None:
        return tensor
    from unmask.distributed.shard import whole_view

    return whole_view(name, tensor, model, meshes)


def load_run(
    trained: Iterable[tuple[str, Tensor]],
    model: nn.Module,
    optimizer: Optimizer,
    meshes: Meshes | None,
    folder: Path,
) -> None:
    """Read a checkpoint of several ranks into a run of any number of ranks; all of them call it.

    Arguments as in `run_tensors`.

    Raises:
        CheckpointError: it holds other tensors than this run trains.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    stored = stored_sizes(folder)
    kinds: dict[str, list[str]] = {}
    for key in stored:
        if key.startswith(_OPTIMIZER):
            name, _, kind = key.removeprefix(_OPTIMIZER).rpartition("/")
            kinds.setdefault(name, []).append(kind)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in kinds:
            optimizer.state[parameter] = {
                kind: _empty_moment(parameter, tuple(stored[f"{_OPTIMIZER}{name}/{kind}"][0])) for kind in kinds[name]
            }
    tensors = run_tensors(trained, model, optimizer, meshes)
    if set(tensors) != set(stored):
        odd = sorted(set(tensors) ^ set(stored))[0]
        raise CheckpointError(f"{folder}: saved for other tensors than this run trains (first: {odd})")
    with torch.no_grad():
        if meshes is None:
            load_alone(tensors, folder)
        else:
            load(tensors, storage_reader=FileSystemReader(folder / SHARDED))


def _empty_moment(parameter: nn.Parameter, shape: tuple[int, ...]) -> Tensor:
    """Return a place for a moment: shaped as its parameter and sharded like it, or a number of its own."""
    if shape:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return torch.zeros((), dtype=torch.float32, device=parameter.device)


def load_plain_optimizer(model: nn.Module, optimizer: Optimizer, meshes: Meshes, folder: Path) -> None:
    """Read the moments that one process has saved, each rank its slices.

    Raises:
        CheckpointError: the file is of other parameters.
    """
    from safetensors import safe_open

    from unmask.distributed.shard import pieces

    places = {name: piece.place for name, piece in pieces(model, meshes)}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with safe_open(folder / FILE, framework="pt") as opened:
        kinds: dict[str, list[str]] = {}
        for key in opened.keys():  # noqa: SIM118 - no mapping
            name, kind = key.rsplit("/", 1)
            kinds.setdefault(name, []).append(kind)
        if set(kinds) != set(trainable):
            odd = sorted(set(kinds) ^ set(trainable))[0]
            raise CheckpointError(f"{folder / FILE}: saved for other parameters than this run trains (first: {odd})")
        for name, parameter in trainable.items():
            moments = optimizer.state[parameter] = {}
            for kind in kinds[name]:
                stored = opened.get_slice(f"{name}/{kind}")
                moment = moments[kind] = _empty_moment(parameter, tuple(stored.get_shape()))
                local = moment.to_local() if hasattr(moment, "to_local") else moment  # pyright: ignore
                if not stored.get_shape():
                    local.copy_(stored[...])
                elif local.numel():
                    local.copy_(stored[places[name]])
