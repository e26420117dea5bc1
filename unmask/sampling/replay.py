"""Network calls recorded as CUDA graphs: with few rows a GPU computes faster than Python can tell it what to compute.

A call of the released sizes with one row launches two to four thousand kernels of a few microseconds each. The calls of
a block are equal but for the tokens, so the second is recorded and from the third on a call is one launch. Elsewhere
than on a CUDA device, and where a network cannot be recorded, the function simply runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Recordings kept; each holds the memory of its intermediate results.
_KEPT = 4


def recordable(model: nn.Module) -> bool:
    """Say whether a network's calls can be recorded: all of it on one CUDA device, experts in a grouped kernel.

    A shard gathers the rest of its weights between kernels, and experts without a grouped kernel are told on the host
    how many tokens each has; neither can be in a graph. Nor can 4-bit weights, whose kernels are not PyTorch's.
    """
    from torch.distributed.tensor import DTensor

    from unmask.models.moe import Experts, grouped_kernel

    for tensor in model.parameters():
        if isinstance(tensor, DTensor) or tensor.device.type != "cuda" or not tensor.is_floating_point():
            return False
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    return all(grouped_kernel(weight[0], weight) for module in experts for weight in module.parameters())


@dataclass
class _Recording:
    """One graph: what it reads and writes, and the object whose tensors are baked into it."""

    owner: Any
    graph: torch.cuda.CUDAGraph | None = None
    inputs: tuple[Tensor, ...] = ()
    output: Tensor | None = None


class Replay:
    """Runs functions of tensors, by recording where `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._kept: OrderedDict[Hashable, _Recording] = OrderedDict()

    def __call__(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], owner: Any, name: Hashable = None
    ) -> Tensor:
        """Return function(*inputs); the result may be overwritten by the next call.

        Args:
            function: launches kernels alone; equal for equal `owner` and `name`.
            inputs: tensors on the device, which may differ from call to call in their values.
            owner: holds every other tensor that the function reads, whose values may change, but not their places.
            name: what else the function depends on.
        """
        if not self.enabled or torch.is_autocast_enabled("cuda"):  # autocast's cache of casts would be recorded
            return function(*inputs)
        key = (id(owner), name, tuple((tensor.shape, tensor.dtype) for tensor in inputs))
        found = self._kept.get(key)
        if found is None or found.owner is not owner:
            self._kept[key] = _Recording(owner)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return function(*inputs)
        self._kept.move_to_end(key)
        if found.graph is None:
            _record(found, function, inputs)
        assert found.graph is not None and found.output is not None
        for kept, given in zip(found.inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        found.graph.replay()
        return found.output


def _record(recording: _Recording, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    recording.inputs = tuple(tensor.clone() for tensor in inputs)
    recording.graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(recording.graph):
        recording.output = function(*recording.inputs)
