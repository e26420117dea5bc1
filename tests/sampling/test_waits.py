"""Law: a network call waits for the device twice, as what it reads goes up and as what it predicts comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from unmask.config.sampler import SamplerConfig
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.engine.loop import StepEvent, denoise
from unmask.sampling.engine.state import Request, send
from unmask.sampling.settings import settings_for

DEVICE = torch.device("meta")  # `TwoDevices` computes what this device's own kernels would not
aten = torch.ops.aten
# What returns numbers to Python, or a shape that depends on them.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.nonzero_static,
}  # fmt: skip
COPYING = {aten._to_copy, aten.copy_}
# A CUDA tensor takes indices from the host, and brings them over.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class There(Tensor):
    """A tensor on a second device, which is made of the CPU: `here` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of the second device outside `TwoDevices`")


class TwoDevices(TorchDispatchMode):
    """Computes on both devices; refuses what CUDA refuses, and `crossings` names what it would have waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        lost = [tensor for tensor in tensors if tensor.device == DEVICE and not isinstance(tensor, There)]
        assert not lost, (
            f"{func}: a tensor made on the device out of the host's numbers, which waits; send it with others"
        )
        target = [torch.device(kwargs["device"])] if kwargs.get("device") is not None else []
        places = {tensor.device for tensor in tensors if tensor.dim()}  # numbers of the host go along with a kernel
        goes_there = target[0] == DEVICE if target else bool(there)
        kind = func.overloadpacket
        if kind in COPYING:
            crosses = len({*(tensor.device for tensor in tensors), *target}) > 1
        elif kind in INDEXING:
            crosses = bool(there) and (len(places) > 1 or any(tensor.dtype == torch.bool for tensor in tensors[1:]))
        else:
            assert len(places) < 2, f"{func} of tensors on two devices"
            crosses = bool(there) and kind in WAITING
        if crosses:
            self.crossings.append(str(func))
        if target and goes_there:
            kwargs["device"] = "cpu"
        of = {id(tensor.here): tensor for tensor in there}
        args, kwargs = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
        result = func(*args, **kwargs)
        if not goes_there:
            return result
        return tree_map_only(Tensor, lambda tensor: of[id(tensor)] if id(tensor) in of else There(tensor), result)


def move(module: nn.Module) -> None:
    """Bring a network to the second device, in place; within `TwoDevices`."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(There(parameter.detach()), requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = There(buffer)


PROMPTS = [[3, 9, 4], [11, 2, 30, 8, 5, 17, 21], [6], [1, 2, 3, 4, 5], [8, 8, 8]]
MASKED: dict[str, Any] = {"steps": 12, "max_new_tokens": 20, "block_size": 8}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llada", MASKED),
    ("llada", {**MASKED, "cfg_scale": 1.5, "temperature": 1.0, "remasking": "random"}),
    ("llada", {**MASKED, "cache": "prefix", "eos": "defer", "threshold": 0.3}),
    ("llada", {**MASKED, "cache": "dual", "threshold": 0.3, "revise": "remask", "revise_threshold": 0.5}),
    ("diffusion_gemma", {"steps": 4, "max_new_tokens": 40}),
    ("diffusion_gemma", {"steps": 4, "max_new_tokens": 40, "cache": "none", "eos": "suppress"}),
]  # fmt: skip


def sampled(
    model: nn.Module, settings: Any, requests: list[Request], counted: Callable[[str, Any], Any]
) -> list[StepEvent]:
    backend = backend_for(model, settings)
    for name in ("prefill", "denoise", "commit"):
        setattr(backend, name, counted(name, getattr(backend, name)))
    return list(denoise(backend, requests, settings, batch_size=2))


@pytest.mark.parametrize(("family", "fields"), SETTINGS, ids=str)
def test_a_call_crosses_between_host_and_device_twice(family, fields, small_model, gemma_model, monkeypatch) -> None:
    """Rows of unequal prompts join, end blocks at their own pace and leave; then a row may cross once more."""
    # Autocast knows no such device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    # The host counts experts' tokens where a device has no kernel for groups, which is not what is tested.
    monkeypatch.setattr("unmask.models.experts.grouped_kernel", lambda *_: True)
    model = gemma_model if family == "diffusion_gemma" else small_model(n_layers=2)
    settings = settings_for(model, SamplerConfig(**fields))
    requests = [Request(index, prompt, index) for index, prompt in enumerate(PROMPTS)]
    expected = sampled(model, settings, requests, lambda name, method: method)
    most: dict[str, int] = {}
    other = 0

    def counted(name: str, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal other
            before = len(devices.crossings)
            result = method(*arguments)
            crossed = len(devices.crossings) - before
            most[name] = max(most.get(name, 0), crossed)
            other += crossed if name != "denoise" else 0
            return result

        return call

    with TwoDevices() as devices:
        move(model)
        events = sampled(model, settings, requests, counted)
    left = sum(bool(event.finished_B.any()) for event in events)
    left += settings.noise == "uniform"  # the temperatures of a block's calls go up once
    assert most["denoise"] == 1 and max(most.values()) == 1
    assert 2 * len(events) <= len(devices.crossings) - other <= 2 * len(events) + left, devices.crossings
    # The same blocks and calls; numbers may be rounded otherwise.
    assert sorted(event.rows for event in events) == sorted(event.rows for event in expected)


def test_the_second_device_counts_what_crosses() -> None:
    with TwoDevices() as devices:
        one = torch.ones(3).to(DEVICE)
        assert devices.crossings == ["aten._to_copy.default"] and one.device == DEVICE
        one.add(1).mul(torch.arange(3, device=DEVICE)).add_(one.new_zeros(3))
        assert len(devices.crossings) == 1
        for crosses in (
            lambda: one.cpu(), lambda: float(one[0]), lambda: bool(one.any()),
            lambda: one.nonzero(), lambda: one[one > 0], lambda: one[torch.tensor([0])],
            lambda: one.copy_(torch.ones(3)),
        ):  # fmt: skip
            before = len(devices.crossings)
            crosses()
            assert len(devices.crossings) == before + 1
        with pytest.raises(RuntimeError, match="tolist"):
            one.tolist()
        with pytest.raises(AssertionError, match="on two devices"):
            one.add(torch.ones(3))
        with pytest.raises(AssertionError, match="send it with others"):
            one.add(torch.tensor([1.0, 2.0, 3.0], device=DEVICE))


DTYPES = [torch.int64, torch.bool, torch.float32, torch.bfloat16, torch.float64]
shapes = st.lists(st.integers(0, 3), max_size=3)


@given(kinds=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_tensors_sent_together_arrive_as_they_were_in_one_copy(kinds, seed) -> None:
    numbers = torch.Generator().manual_seed(seed)
    tensors = [(100 * torch.randn(shape, generator=numbers)).to(dtype) for dtype, shape in kinds]
    with TwoDevices() as devices:
        there = send(tensors, DEVICE)
        assert len(devices.crossings) == 1 and all(tensor.device == DEVICE for tensor in there)
        back = send(there, torch.device("cpu"))
        assert len(devices.crossings) == 2
        assert all(one is other for one, other in zip(send(there, DEVICE), there, strict=True))
    for one, other in zip(tensors, back, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
