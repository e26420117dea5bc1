"""The kernels that a device takes for a network's shapes, and whether they compute what plain code does.

Shapes: M rows sorted by expert, E experts, I inputs, O outputs of a matrix; L positions, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.distributed.runtime import compiles_on, fast_bf16, flex_available, idle_tensor_cores
from unmask.doctor.findings import Finding
from unmask.doctor.subject import Subject
from unmask.doctor.trial import attention_calls, ragged_batch
from unmask.models.experts import Experts, grouped_kernel, grouped_linear
from unmask.models.loading import empty_network

# Only data centres' devices give a block more shared memory, and FlexAttention's kernels for large heads need it.
_SMALL_SHARED_MEMORY, _LARGE_HEAD = 110_000, 128
_FLEX = "https://github.com/pytorch/pytorch/issues/198224"
_CUDNN = "https://github.com/pytorch/pytorch/issues/196678"
_GROUPED = "https://github.com/pytorch/pytorch/issues/172439"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a norm's share
# Rows of each expert: some, none at the start, in the middle and at the end; and none at all.
GROUPS = ((0, 5, 0, 7, 4, 0), (16, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0))


def check_attention(subject: Subject) -> Iterator[Finding]:
    """Say which kernel each attention of the network takes on its device."""
    device, dtype = subject.device, subject.compute_dtype
    if device.type == "cuda":
        yield _masked_attention(device)
    else:
        yield Finding("note", "not checked: attention on CUDA; torch sees no CUDA device here")
    if subject.plan is None:
        return
    rows = 2 if subject.config is None else max(2, subject.config.step_scheduler.local_batch_size)
    batch = ragged_batch(subject.plan.config.vocab_size, rows, subject.length)
    calls = attention_calls(subject.plan, subject.objective, batch, device)
    if device.type == "cpu" and subject.config is not None:
        dtype = torch.float32  # in which `attend` has a CPU's gradients computed
    for call, times in calls.items():
        kernel = call.kernel(device, dtype)
        what = f"{times} × {call.text}: SDPA takes {kernel} in {_name(dtype)}"
        if kernel == "math":
            yield Finding("warning", f"{what}, which holds all scores", "set distributed.autocast_dtype: bfloat16")
        else:
            yield Finding("ok", what)
    if subject.config is not None and subject.config.distributed.attention == "flex":
        yield _flex(device, max(call.query_BHQE[3] for call in calls))


def _flex(device: torch.device, head_size: int) -> Finding:
    if not flex_available(device):
        return Finding(
            "error",
            f"distributed.attention: flex needs a CUDA device of compute capability 8.0 or later with Triton, not "
            f"{device}",
            "set sdpa",
        )
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if head_size > _LARGE_HEAD and shared < _SMALL_SHARED_MEMORY:
        what = f"FlexAttention may not compile for heads of {head_size}: a block has {shared:,} bytes of shared memory"
        return Finding("warning", f"{what} ({_FLEX})", "set distributed.attention: sdpa")
    return Finding("ok", f"FlexAttention compiles for heads of up to {head_size} and {shared:,} bytes a block")


def _masked_attention(device: torch.device) -> Finding:
    what = "gradients of attention under a mask, of 192 positions with low scores"
    if masked_gradients_finite(device):
        return Finding("ok", f"{what}, are finite")
    remedy = "train with unmask train, which leaves cuDNN's kernels out; elsewhere call enable_cudnn_sdp(False)"
    return Finding("warning", f"{what}, are no numbers with cuDNN's kernel ({_CUDNN})", remedy)


def masked_gradients_finite(device: torch.device, length: int = 192, size: int = 64) -> bool:
    """Say whether SDPA's gradients are finite under a mask where every score is about −120.

    cuDNN's kernel gave NaN on Hopper at lengths of 64 mod 128 (pytorch issue 196678), with torch 2.11 to 2.13.
    """
    draw = torch.Generator().manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, 1, length, size, generator=draw) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(size)
    inputs = [part.to(device, torch.bfloat16).requires_grad_() for part in (q, k, v)]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    return all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(out.float().sum(), inputs))


def check_experts(subject: Subject) -> Iterator[Finding]:
    """Say how a mixture's experts are multiplied, and compare the grouped matmul with a loop, empty groups included."""
    device, dtype = subject.device, subject.compute_dtype
    if subject.plan is not None:
        with torch.device("meta"):
            model = empty_network(subject.plan.family, subject.plan.config)
        experts = next((module for module in model.modules() if isinstance(module, Experts)), None)
        if experts is None:
            return
        for name, weight in experts.named_parameters():
            shape = " × ".join(map(str, weight.shape))
            row = torch.empty(0, weight.shape[2], device=device, dtype=dtype)
            if grouped_kernel(row, torch.empty(1, *weight.shape[1:], device=device, dtype=dtype)):
                yield Finding("ok", f"experts' {name} ({shape}): one grouped matmul in {_name(dtype)}")
            else:
                what = f"experts' {name} ({shape}): a matmul an expert in {_name(dtype)}, which waits for the device"
                yield Finding("note", f"{what}: the grouped kernel takes bfloat16 on Hopper, rows of whole 16 bytes")
    for compute in (torch.float32, torch.bfloat16):
        worst = max(grouped_error(device, compute, counts) for counts in GROUPS)
        what = f"grouped matmul in {_name(compute)} on {device.type}, groups without rows included,"
        if worst < TOLERANCE[compute]:
            yield Finding("ok", f"{what} equals a loop" + (f" to {worst:.0e}" if worst else ""))
        else:
            yield Finding("error", f"{what} differs from a loop by {worst:.0e} ({_GROUPED})", "install a newer torch")


def grouped_error(device: torch.device, dtype: torch.dtype, counts_E: Sequence[int], sizes: int = 32) -> float:
    """Return how far outputs and gradients of `grouped_linear` are from a loop's, in a norm's share; ∞ for NaN.

    Freed memory is full of NaN before, which is what a kernel shows that leaves a group without rows unwritten.
    """
    draw = torch.Generator().manual_seed(sum(counts_E))
    rows_MI = torch.randn(sum(counts_E), sizes, generator=draw).to(device, dtype).requires_grad_()
    weight_EOI = torch.randn(len(counts_E), 2 * sizes, sizes, generator=draw).to(device, dtype).requires_grad_()
    upstream_MO = torch.randn(len(rows_MI), 2 * sizes, generator=draw).to(device, dtype)
    parts = zip(rows_MI.split(list(counts_E)), weight_EOI, strict=True)
    loop_MO = torch.cat([part @ weight_OI.t() for part, weight_OI in parts])
    expected = (loop_MO, *torch.autograd.grad(loop_MO, [rows_MI, weight_EOI], upstream_MO))
    fill_freed_memory(device)
    found_MO = grouped_linear(rows_MI, weight_EOI, torch.tensor(counts_E, device=device))
    found = (found_MO, *torch.autograd.grad(found_MO, [rows_MI, weight_EOI], upstream_MO))
    return max(_distance(one, other) for one, other in zip(found, expected, strict=True))


def fill_freed_memory(device: torch.device) -> None:
    """Leave memory behind that is full of NaN, for the next tensors to be made in."""
    for size in (2**8, 2**12, 2**16, 2**20):
        del [torch.full((size,), math.nan, device=device) for _ in range(8)][:]


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return math.inf
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def check_compile(subject: Subject) -> Iterator[Finding]:
    """Say whether torch.compile trains here, and how bf16 is multiplied."""
    device, wanted = subject.device, subject.config is not None and subject.config.distributed.compile
    if compiles_on(device):
        yield Finding("ok", "torch.compile has Triton")
    elif wanted:
        yield Finding(
            "error", f"distributed.compile needs a CUDA device with Triton, and this is {device}", "set false"
        )
    else:
        why = "there is no CUDA device" if device.type != "cuda" else "Triton is not installed"
        yield Finding("note", f"torch.compile does not train here: {why}")
    bf16 = subject.compute_dtype == torch.bfloat16
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if bf16 and major < 8:
            yield Finding("warning", f"bfloat16 is emulated at compute capability {major}.{minor}", "use float32")
        elif subject.plan is not None and (idle := idle_tensor_cores(device, _name(subject.compute_dtype))):
            yield Finding("warning", idle, "multiply in bfloat16 (distributed.autocast_dtype, or --dtype)")
        return
    fast = fast_bf16()
    unit = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX512_BF16" if fast else "neither AMX nor AVX512_BF16"
    if bf16 and not fast:
        yield Finding("warning", f"bfloat16 is emulated here: this CPU has {unit}", "use float32")
    else:
        one = "oneDNN" if torch.backends.mkldnn.is_available() else "plain loops"
        speed = "bfloat16 is the faster dtype" if fast else "float32 is the faster dtype"
        yield Finding("ok", f"matmuls go through MKL in float32 and {one} in bfloat16; this CPU has {unit}: {speed}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
