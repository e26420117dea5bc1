"""FlexAttention against SDPA with the same mask, on the CPU, where flex runs uncompiled; and SDPA's kernels on GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unmask.distributed import runtime
from unmask.distributed.runtime import flex_available
from unmask.models import layers
from unmask.models.layers import attend, prepare_mask, takes_groups
from unmask.models.loading import empty_network
from unmask.models.registry import family_named

ROWS, LENGTH = 3, 150  # more than one block of 128, and not a whole number of them


def padding() -> Tensor:
    lengths_B = torch.tensor([150, 97, 1])
    return (torch.arange(LENGTH) < lengths_B[:, None])[:, None, None, :]


def packing() -> Tensor:
    document_BL = torch.stack([torch.arange(LENGTH) // size for size in (150, 40, 7)])
    return (document_BL[:, :, None] == document_BL[:, None, :])[:, None]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let flex run as it stands, and count its calls."""
    calls: list[int] = []

    def eager(*tensors: Tensor, **options) -> Tensor:
        calls.append(1)
        return flex_attention(*tensors, **options)  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(layers, "compiled_flex", lambda: eager)
    return calls


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("make", [padding, packing, lambda: packing()[1:2]], ids=["padding", "packing", "one for all"])
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_is_sdpa_with_the_same_mask(make, groups: int, uncompiled: list[int]) -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(ROWS, heads, LENGTH, 16, generator=generator) for heads in (4, groups, groups))
    mask = make()
    prepared = prepare_mask(mask, "flex", ROWS, LENGTH, LENGTH)
    assert isinstance(prepared, BlockMask)
    torch.testing.assert_close(attend(q, k, v, prepared), attend(q, k, v, mask))
    assert len(uncompiled) == 1
    assert not torch.allclose(attend(q, k, v, prepared), attend(q, k, v, None), atol=1e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_network_prepares_its_mask_once(network, monkeypatch: pytest.MonkeyPatch, uncompiled: list[int]) -> None:
    from unmask.models.llada import model as module

    made: list[object] = []
    monkeypatch.setattr(module, "prepare_mask", lambda *given: made.append(prepare_mask(*given)) or made[-1])
    model = network(n_kv_heads=2, d_model=64).eval()
    ids = torch.randint(27, (2, 20), generator=torch.Generator().manual_seed(1))
    keep = torch.arange(20) < torch.tensor([20, 6])[:, None]
    with torch.no_grad():
        expected = model(ids, keep)
        assert not uncompiled  # SDPA unless asked
        model.transformer.attention_kernel = "flex"
        found = model(ids, keep)
    torch.testing.assert_close(found, expected)
    assert [type(mask) for mask in made] == [torch.Tensor, BlockMask] and len(uncompiled) == 2  # one a layer


def test_other_masks_and_the_cpu_stay_with_sdpa() -> None:
    assert not flex_available(torch.device("cpu"))
    assert prepare_mask(None, "flex", ROWS, LENGTH, LENGTH) is None
    mask, per_head = packing(), packing().expand(-1, 4, -1, -1)
    assert prepare_mask(mask, "sdpa", ROWS, LENGTH, LENGTH) is mask
    assert prepare_mask(per_head, "flex", ROWS, LENGTH, LENGTH) is per_head


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_flex_wants_ampere(capability, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(runtime, "find_spec", lambda name: object())
    assert flex_available(torch.device("cuda")) is expected


def test_which_calls_have_a_fused_kernel_for_grouped_heads() -> None:
    narrow, wide = torch.bfloat16, torch.float32
    assert all(takes_groups(*call, "cpu") for call in product((64, 512), (False, True), (narrow, wide)))
    on_a_gpu = {call: takes_groups(*call, "cuda") for call in product((64, 256, 512), (False, True), (narrow, wide))}
    assert [call for call, taken in on_a_gpu.items() if taken] == [(64, False, narrow), (256, False, narrow)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["all", "causal", "by key", "by pair"])
@pytest.mark.parametrize(("groups", "size"), [(1, 16), (2, 16), (2, 512)])
def test_heads_repeated_for_a_kernel_change_nothing(
    groups: int, size: int, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v, probe = (
        torch.randn(2, heads, 9, size, generator=generator).to(dtype).requires_grad_()
        for heads in (4, groups, groups, 4)
    )
    keep_BQK = torch.rand(2, 1, 1 if case == "by key" else 9, 9, generator=generator) < 0.7
    mask = keep_BQK | torch.eye(9, dtype=torch.bool)[: keep_BQK.shape[2]] if case.startswith("by") else None
    found = []
    for shared in (True, False):
        monkeypatch.setattr(layers, "takes_groups", lambda *_, shared=shared: shared)
        out = attend(q, k, v, mask, causal=case == "causal", scale=0.2)
        found.append((out, *torch.autograd.grad(out, (q, k, v), probe)))
    exact = dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)


def fused_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> list[str]:
    """The kernels that take a call on any GPU since Ampere, by the rules of PyTorch's `sdp_utils.cpp`."""
    rows, heads, queries, size = q.shape
    if len({q.dtype, k.dtype, v.dtype}) > 1 or {1} != {t.stride(-1) for t in (q, k, v)} or k.shape != v.shape:
        return []
    alike = k.shape[1] == heads
    shape_fits = mask is None or all(
        given in (1, wanted) for given, wanted in zip(mask.shape, (rows, heads, queries, k.shape[2]), strict=True)
    )
    found = []
    if mask is None and size <= 256 and q.dtype in (torch.bfloat16, torch.float16) and (alike or grouped):
        found.append("flash")
    if alike and size % 8 == 0 and shape_fits and (mask is None or mask.stride(-1) == 1):
        found.append("memory-efficient")
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The fused kernels of each call of SDPA."""
    made: list[list[str]] = []
    run = F.scaled_dot_product_attention

    def counted(
        q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, enable_gqa: bool = False, **options: Any
    ) -> Tensor:
        made.append(fused_kernels(q, k, v, attn_mask, enable_gqa))
        return run(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return made


@pytest.fixture
def released(fixtures: Path, meta_gpu: torch.device) -> Callable[..., nn.Module]:
    """Return a function that makes a network of a released width, without data and of few layers."""

    def make(folder: str, **changes: Any) -> nn.Module:
        values = json.loads((fixtures / folder / "config.json").read_text())
        for place, changed in changes.items():
            values[place] = {**values[place], **changed} if isinstance(changed, dict) else changed
        chosen = family_named(values, "config.json")
        with meta_gpu:
            return empty_network(chosen, chosen.parse_config(values, "config.json"))

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_canvas_network_never_needs_the_math_kernel(
    released, calls, meta_gpu, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr("unmask.models.experts.grouped_kernel", lambda *_: True)
    monkeypatch.setattr(F, "grouped_mm", lambda rows, weight, offs: rows.new_empty(len(rows), weight.shape[2]))
    text = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = released("diffusiongemma_26b_a4b_it", text_config=text).to(dtype)
    ids, canvas = torch.zeros(3, 1500, dtype=torch.int64), torch.zeros(3, 256, dtype=torch.int64)
    ids, canvas = ids.to(meta_gpu), canvas.to(meta_gpu)
    flash = ["flash"] if dtype == torch.bfloat16 else []
    with torch.no_grad():
        short = model.encode(ids[:, :900])
        assert calls == [flash or ["memory-efficient"], ["memory-efficient"]]
        model.decode(canvas, short)
        assert calls[2:] == calls[:2]
        long = model.encode(ids)  # longer than the window, so that its layers have a mask
        for options in ({"starts": [1500, 200, 30]}, {"starts": [9, 4], "rows": torch.tensor([2, 0], device=meta_gpu)}):
            model.decode(canvas[: len(options["starts"])], long, **options)
        model.encode(canvas, past=short)
        model.encode(ids, torch.ones_like(ids))
    assert len(calls) == 14 and all(calls)
    monkeypatch.setattr(layers, "takes_groups", lambda *_: True)
    with torch.no_grad():
        model.decode(canvas, long, starts=[1500, 200, 30])
    assert calls[14:] == [[], []]  # what it would be with grouped heads


@pytest.mark.parametrize("kv_heads", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_network_never_needs_the_math_kernel(released, calls, meta_gpu, dtype: torch.dtype, kv_heads) -> None:
    model = released("llada_8b_instruct", n_layers=2, n_kv_heads=kv_heads or 32).to(dtype)
    ids = torch.zeros(2, 300, dtype=torch.int64).to(meta_gpu)
    with torch.no_grad():
        model(ids)
        model(ids, torch.ones_like(ids))
        model(ids, torch.ones(2, 1, 300, 300, dtype=torch.bool).to(meta_gpu))
    assert len(calls) == 6 and all(calls)
