"""Network calls on a CUDA device, recorded once and replayed.

A call of a few rows is over sooner on the device than Python has launched its kernels one by one. Calls of a block are
alike but for what is in their tensors: recorded as a CUDA graph (PyTorch notes, "CUDA semantics", section CUDA Graphs),
the kernels are launched at once. The same kernels run on the same numbers, so the results are the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Set to 0, it has every call launched kernel by kernel, the same kernels on the same numbers.
SWITCH = "UNMASK_REPLAY"
# Calls of a kind before it is recorded: the first one makes libraries ready. A recording costs about three calls.
_BEFORE = 1
# Recordings kept at a time. One more takes the place of one not replayed for so many calls, or is not made: kinds that
# take turns would be recorded again and again.
_KEPT = 8
_UNUSED = 32
# Tokens of the largest call that is recorded. Larger ones keep the device busy by themselves.
_MOST_TOKENS = 4096

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Recording:
    """One recorded call: `replay` reads `inputs`, which are written anew before it, and writes `output`."""

    function: Function  # keeps alive what it refers to, whose addresses the recording holds
    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], None]


class Replays:
    """Calls a network, by a recording where there is one; without `record` calls are never recorded.

    `pads` has small calls made alike all the same.
    """

    def __init__(
        self, record: Callable[[Function, Sequence[Tensor]], Recording] | None, pads: bool | None = None
    ) -> None:
        self._record = record
        self._pads = record is not None if pads is None else pads
        self._scope: object = None
        self._number = 0
        self._calls: dict[Hashable, int] = {}
        self._used: dict[Hashable, int] = {}
        self._kept: dict[Hashable, Recording] = {}

    def pads(self, tokens: int, device: torch.device) -> bool:
        """Whether calls that compute so many tokens are to be made alike by padding: one recording then serves several.

        Padding rounds otherwise, so this asks for the kind of call, not for whether it is recorded in the end.
        """
        if not self._pads or tokens > _MOST_TOKENS:
            return False
        # Under autocast weights are cast copies, which are gone when it ends.
        return not torch.is_autocast_enabled(device.type)

    def __call__(self, scope: object, kind: Hashable, function: Function, *inputs: Tensor) -> Tensor:
        """Return function(*inputs), which is valid until the next call.

        Args:
            scope: what the function reads beside its inputs and the network; recordings last as long as calls have the
                same one.
            kind: says all else that the call depends on beside the inputs; their shapes need not be said.
            function: without gradients; it may wait for the device nowhere. What it refers to is kept as long as the
                recording, so it must not refer to who holds this object.
            inputs: on the device; the first are the tokens that the network computes.
        """
        if self._record is None or not self.pads(inputs[0].numel(), inputs[0].device):
            return function(*inputs)
        if scope is not self._scope:
            self._scope = scope
            self._calls.clear()
            self._used.clear()
            self._kept.clear()
        self._number += 1
        key = (kind, *((tuple(tensor.shape), tensor.dtype) for tensor in inputs))
        recording = self._kept.get(key)
        if recording is None:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls > _BEFORE and self._has_room():
                recording = self._recorded(key, function, inputs)
        if recording is None:
            return function(*inputs)
        self._kept[key] = self._kept.pop(key)  # the least recently used come first
        self._used[key] = self._number
        for kept, given in zip(recording.inputs, inputs, strict=True):
            kept.copy_(given)
        recording.replay()
        return recording.output

    def _has_room(self) -> bool:
        if len(self._kept) < _KEPT:
            return True
        oldest = next(iter(self._kept))
        if self._number - self._used[oldest] <= _UNUSED:
            return False
        del self._kept[oldest]
        return True

    def _recorded(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> Recording | None:
        assert self._record is not None
        try:
            recording = self._kept[key] = self._record(function, inputs)
        except RuntimeError as error:  # of the device's runtime: something waits for it, say, or memory is short
            self._record = None
            self._kept.clear()
            reason = str(error).strip().splitlines() or [type(error).__name__]
            said = f"network calls are launched kernel by kernel: {reason[0]} ({SWITCH}=0 has them so from the start)"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
            return None
        return recording


def replays_for(model: nn.Module) -> Replays:
    """Return what calls a network: with recordings on a CUDA device.

    Without where a recording would miss something or cannot be made: weights shared out over ranks or quantised, hooks.
    """
    parameters = list(model.parameters())
    plain = all(type(parameter.data) is Tensor and parameter.is_floating_point() for parameter in parameters)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    on_cuda = bool(parameters) and parameters[0].device.type == "cuda"
    if not (plain and on_cuda) or hooked:
        return Replays(None)
    if os.environ.get(SWITCH) == "0":
        return Replays(None, pads=True)
    pool: Any = torch.cuda.graph_pool_handle()
    return Replays(lambda function, inputs: _record(function, inputs, pool))


def _record(function: Function, inputs: Sequence[Tensor], pool: Any) -> Recording:
    """Record a call in memory that recordings share, since never two of them run at a time."""
    device = inputs[0].device
    with torch.cuda.device(device):
        kept = tuple(given.clone() for given in inputs)
        with _no_waiting():
            function(*kept)
        graph, here, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), _stream(device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream), _no_collection():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = function(*kept)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which says only that something went wrong before
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(stream)
    return Recording(function, kept, output, graph.replay)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Refuse what waits for the device: a recording that fails leaves the device's generator unusable."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which this device's calls are recorded; memory is shared within a stream only."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector away, which may come upon another graph: to free one ends the recording of this one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
