"""Law: a layer's pass launches no more kernels than are counted here, so that a needless cast or copy is seen.

A layer of each family with the released switches runs on the meta device, which has shapes and dtypes and no numbers;
a mode counts the operations as a CUDA device would get them. Some of them, such as a sort, launch several kernels.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from unmask.models.diffusion_gemma.model import AttentionInputs, Layer
from unmask.models.layers import rotary_tables
from unmask.models.llada.model import Block
from unmask.models.registry import family_named

# Operations that launch nothing, beside views of another tensor, and why.
NO_LAUNCH = {
    "empty": "memory alone",
    "empty_like": "memory alone",
    "new_empty": "memory alone",
    "_unsafe_view": "a view that autograd does not know as one",
}
ROWS, LENGTH, BEFORE = 2, 24, 16


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel, with the dtypes of what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, returned = func.overloadpacket.__name__, func._schema.returns
        view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not view and name not in NO_LAUNCH:
            dtypes = [str(each.dtype).removeprefix("torch.") for each in args if isinstance(each, Tensor)]
            self.counts[f"{name}({', '.join(dtypes)})"] += 1
        return func(*args, **(kwargs or {}))


class CudaAutocast(TorchFunctionMode):
    """On the meta device: autocast as on CUDA devices, and attention by a fused kernel.

    It knows the functions that our layers call (lists of PyTorch 2.13: aten/src/ATen/autocast_mode.h).
    """

    PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention)
    WIDE = (F.rms_norm,)

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    @contextlib.contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        yield
        self.enabled = before

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        dtype = torch.bfloat16 if func in self.PRODUCTS else torch.float32 if func in self.WIDE else None
        if self.enabled and dtype is not None:
            args = tree_map_only(Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, args)
        return fused_attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None, is_causal: bool, scale: float | None, **_: Any):
    """Return attention by the operation that SDPA comes to on CUDA devices, where no mask is given."""
    if q.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    needs = any(each.requires_grad for each in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, needs, 0.0, is_causal, scale=scale)[0]


@pytest.fixture
def on_meta(meta_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaAutocast]:
    """Autocast, attention and RMS norm as CUDA devices have them: a norm of one dtype is one operation each way."""

    def norm(x: Tensor, shape: Any, weight: Any, eps: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    def norm_backward(gradient: Any, x: Tensor, shape: Any, rstd: Any, weight: Any, wanted: Any) -> Any:
        return torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None

    mode = CudaAutocast(enabled=True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "meta" and mode.enabled)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: mode.switched(enabled))
    with torch.library._scoped_library("aten", "IMPL") as library:
        # Past the check of `impl`, which would have it taken apart as on CPUs.
        library.m.impl("_fused_rms_norm", "Meta", norm)  # pyright: ignore[reportOptionalMemberAccess]
        library.impl("_fused_rms_norm_backward", norm_backward, "Meta")
        yield mode


Run = Callable[[Tensor], Any]
Layers = Callable[[str, torch.dtype], tuple[nn.Module, Tensor, Run]]

# Launches of the forward pass, with gradients or without, and of the backward pass.
BUDGET: dict[str, dict[str, tuple[int, int]]] = {
    "llada": {"fp32, autocast": (31, 44), "bf16, autocast": (22, 33), "bf16": (22, 33)},
    "sliding encoder": {"fp32, autocast": (77, 97), "bf16, autocast": (66, 88), "bf16": (66, 88)},
    "sliding decoder": {"fp32, autocast": (79, 97), "bf16, autocast": (68, 88), "bf16": (68, 88)},
    "full encoder": {"fp32, autocast": (77, 96), "bf16, autocast": (67, 88), "bf16": (67, 88)},
    "full decoder": {"fp32, autocast": (79, 96), "bf16, autocast": (69, 88), "bf16": (69, 88)},
}
CASES = [(name, weights) for name, budgets in BUDGET.items() for weights in budgets]


def llada_block(values: dict, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Run]:
    config: Any = family_named(values, "config.json").parse_config(values, "config.json")
    block = Block(config).to(dtype)
    tables = rotary_tables(torch.arange(LENGTH)[None], config.head_dim, config.rope_theta)
    return block, torch.zeros(ROWS, LENGTH, config.d_model, dtype=dtype), lambda hidden: block(hidden, *tables, None)


def gemma_layer(values: dict, dtype: torch.dtype, kind: str, role: str) -> tuple[nn.Module, Tensor, Run]:
    config: Any = family_named(values, "config.json").parse_config(values, "config.json")
    layer, (kv_heads, size) = Layer(config, kind).to(dtype), config.heads(kind)
    tables = rotary_tables(torch.arange(LENGTH)[None], size, 1e4)
    inputs = AttentionInputs(*tables, None, role == "encoder", slice(None))
    shape = (ROWS, kv_heads, BEFORE, size)  # which a layer leaves in the dtype of products
    past = None if role == "encoder" else (torch.zeros(shape, dtype=torch.bfloat16),) * 2
    hidden_BLD = torch.zeros(ROWS, LENGTH, config.hidden_size, dtype=dtype)
    return layer, hidden_BLD, lambda hidden: layer(hidden, inputs, past, layer.layer_scalar)


@pytest.fixture
def layers(gemma_values: Callable[..., dict], tiny: Any) -> Layers:
    """Return a function that makes a small layer by name and dtype, its input, and a function that runs it.

    Full layers have the released head size, which flash kernels do not take.
    """

    def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Run]:
        if name == "llada":
            return llada_block(tiny.model, dtype)
        kind, role = name.split()
        return gemma_layer(gemma_values(head_dim=16, global_head_dim=512), dtype, f"{kind}_attention", role)

    return make


def watched(
    layer: nn.Module, hidden_BLD: Tensor, run: Run, watch: Callable[[], Any], autocast: Callable[[], Any]
) -> Any:
    """Return what `watch` saw of a forward pass, the backward pass and a forward pass without gradients."""
    hidden_BLD.requires_grad_()
    with watch() as forward, autocast():
        outputs = run(hidden_BLD)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    assert outputs[0].dtype == hidden_BLD.dtype, "the residual stream changed its dtype"
    gradients = [torch.ones_like(each) for each in outputs]
    with watch() as backward:
        torch.autograd.grad(outputs, [hidden_BLD, *layer.parameters()], gradients)
    with watch() as sampling, autocast(), torch.no_grad():
        run(hidden_BLD)
    return {"forward": forward, "backward": backward, "sampling": sampling}


def check_budget(seen: dict[str, Launches], name: str, weights: str) -> None:
    """AssertionError with a table of all launches where a pass has more than it may."""
    forward, backward = BUDGET[name][weights]
    budget = {"forward": forward, "backward": backward, "sampling": forward}
    for each, mode in seen.items():
        table = "\n".join(f"{count:4} {operation}" for operation, count in mode.counts.most_common())
        assert mode.counts.total() <= budget[each], f"{each}: {mode.counts.total()} of {budget[each]}\n{table}"


def dtype_of(weights: str) -> torch.dtype:
    return torch.float32 if weights.startswith("fp32") else torch.bfloat16


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_a_layer_keeps_its_budget(
    layers: Layers, on_meta: CudaAutocast, meta_gpu: Any, name: str, weights: str
) -> None:
    on_meta.enabled = weights.endswith("autocast")
    with meta_gpu:
        layer, hidden_BLD, run = layers(name, dtype_of(weights))
    check_budget(watched(layer, hidden_BLD, run, Launches, lambda: on_meta), name, weights)


def test_a_needless_cast_breaks_it(layers: Layers, on_meta: CudaAutocast, meta_gpu: torch.device) -> None:
    with meta_gpu:
        block, hidden_BLD, run = layers("llada", torch.float32)
    seen = watched(block, hidden_BLD, lambda hidden: run(hidden.bfloat16().float()), Launches, lambda: on_meta)
    with pytest.raises(AssertionError, match=r"forward: 33 of 31\n +\d+ _to_copy"):
        check_budget(seen, "llada", "fp32, autocast")
