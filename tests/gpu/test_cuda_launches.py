"""Law: a layer launches no more on a GPU than is counted on the meta device (tests/models/test_launches.py).

Check 6 of `make gpu`, beside the waits. The operations are counted once more, with CUDA's own autocast and choice of
kernels; then the kernels themselves, by PyTorch's profiler.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.models.test_launches import CASES, Launches, check_budget, dtype_of, layers, watched  # noqa: F401

pytestmark = pytest.mark.gpu

# Operations of several kernels, and how many they may take; all others take one.
KERNELS = {
    "_fused_rms_norm_backward": 3,
    "_grouped_mm": 2,
    "_scaled_dot_product_cudnn_attention_backward": 4,
    "_scaled_dot_product_efficient_attention_backward": 4,
    "_scaled_dot_product_flash_attention_backward": 4,
    "cumsum": 3,
    "index_put": 12,
    "mm": 2,
    "sort": 12,
    "topk": 8,
}


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_a_layer_keeps_its_budget(cuda, layers, measured, name: str, weights: str) -> None:  # noqa: F811
    if torch.cuda.get_device_properties(cuda).major not in (9, 10):
        pytest.skip("PyTorch has a grouped matmul for Hopper and data-centre Blackwell alone")
    with cuda:
        layer, hidden_BLD, run = layers(name, dtype_of(weights))
    with torch.no_grad():
        for tensor in [hidden_BLD, *layer.parameters()]:
            tensor.normal_(0, 0.1)

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=weights.endswith("autocast"))

    seen = watched(layer, hidden_BLD, run, Launches, autocast)  # which also loads the kernels
    check_budget(seen, name, weights)
    traces = watched(layer, hidden_BLD, run, lambda: profile(activities=[ProfilerActivity.CUDA]), autocast)
    for each, trace in traces.items():
        events = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
        kernels = Counter(event.name for event in events if not event.name.startswith(("Memcpy", "Memset")))
        bound = sum(count * KERNELS.get(op.partition("(")[0], 1) for op, count in seen[each].counts.items())
        measured(f"{name:16}{weights:16}{each:10}{seen[each].counts.total():4} operations{kernels.total():5} kernels")
        assert 0 < kernels.total() <= bound, (kernels.most_common(), bound)
