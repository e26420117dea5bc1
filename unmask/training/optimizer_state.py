"""The optimizer's moments as named tensors, so that a checkpoint does not depend on the order of parameters."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.errors import CheckpointError
from unmask.models.weights import write_tensors

FILE = "optimizer.safetensors"


def save_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write every state tensor under `<parameter name>/<state name>`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{kind}"] = tensor.detach().cpu().contiguous()
    write_tensors(tensors, folder / FILE)


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Put saved moments back, in their own dtypes, on each parameter's device.

    Raises:
        CheckpointError: the file is of other parameters.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / FILE).items():
        name, kind = key.rsplit("/", 1)
        stored.setdefault(name, {})[kind] = tensor
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(stored) != set(trainable):
        odd = sorted(set(stored) ^ set(trainable))[0]
        raise CheckpointError(f"{folder / FILE}: saved for other parameters than this run trains (first: {odd})")
    for name, parameter in trainable.items():
        optimizer.state[parameter] = {kind: tensor.to(parameter.device) for kind, tensor in stored[name].items()}
