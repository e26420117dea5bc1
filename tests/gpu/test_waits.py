"""Law: a denoising call waits for the device twice at most, counted by PyTorch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from unmask.config.sampler import SamplerConfig
from unmask.models.loading import load_model
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.engine.loop import denoise
from unmask.sampling.engine.state import Request
from unmask.sampling.settings import settings_for

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("folder", "fields"),
    [
        ("llada_tiny", {"block_size": 8, "steps": 24, "temperature": 1.0}),
        ("llada_tiny", {"block_size": 8, "steps": 24, "cache": "prefix"}),
        ("llada_tiny", {"block_size": 8, "steps": 24, "cache": "dual", "cfg_scale": 1.0}),
        ("diffusion_gemma_step", {"steps": 6, "confidence_threshold": 0.0, "eos": "suppress"}),
    ],
    ids=str,
)
def test_a_denoising_call_waits_twice(fixtures: Path, cuda, folder, fields) -> None:
    model = load_model(str(fixtures / folder), "bfloat16", cuda)
    settings = settings_for(model, SamplerConfig(max_new_tokens=24, **fields))
    requests = [Request(index, prompt, index) for index, prompt in enumerate([[5, 6, 7], [9, 10, 11, 12, 13]])]
    list(denoise(backend_for(model, settings), requests, settings))  # kernels are compiled and handles made
    loop, waits = denoise(backend_for(model, settings), requests, settings), []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        while True:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                event = next(loop, None)
            if event is None:
                break
            waits.append(sum("called a synchronizing CUDA operation" in str(each.message) for each in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Between two events lie one call and, where a block or a row has ended, what its rows keep of it.
    assert min(waits) == sorted(waits)[len(waits) // 2] == 2, waits
