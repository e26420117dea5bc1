"""Counted operations of a step equal those that PyTorch counts while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.batch import Batch, Pass, Work
from unmask.config.model import PeftConfig
from unmask.models.diffusion_gemma.family import FAMILY as GEMMA
from unmask.models.diffusion_gemma.model import DiffusionGemma
from unmask.models.diffusion_gemma.model import initialise as initialise_gemma
from unmask.models.llada.family import FAMILY as LLADA
from unmask.models.llada.model import LLaDA, initialise
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.rng import NoiseStream
from unmask.training import flops
from unmask.training.flops import Peak, StepFlops, count_flops, peak_flops
from unmask.training.lora import attach

LLADA_VALUES = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64, "vocab_size": 40,
    "embedding_size": 48, "mask_token_id": 39, "eos_token_id": 38, "pad_token_id": 38, "max_sequence_length": 64,
}  # fmt: skip


def batch(rows: int, length: int, answer: int) -> Batch:
    """Rows of one length without padding, the last `answer` tokens supervised."""
    supervised_BL = torch.zeros(rows, length, dtype=torch.bool)
    supervised_BL[:, -answer:] = True
    return Batch(
        input_ids_BL=torch.arange(rows * length).view(rows, length) % 30 + 2,
        supervised_BL=supervised_BL,
        attention_mask_BL=torch.ones(rows, length, dtype=torch.bool),
        answer_lengths_B=supervised_BL.sum(1),
        sample_ids_B=torch.arange(rows),
        epoch=0,
        slots_B=torch.arange(rows),
        global_rows=rows,
        cut_B=torch.zeros(rows, dtype=torch.bool),
        peers_P=torch.arange(rows),
    )


def network(family: Any, values: dict[str, Any], trained: str) -> Any:
    config = family.parse_config(values, "test")
    model: Any = (LLaDA if family is LLADA else DiffusionGemma)(config)
    (initialise if family is LLADA else initialise_gemma)(model, torch.Generator().manual_seed(0))
    model.double()  # whose experts are multiplied one by one: PyTorch does not count grouped products
    if trained == "lora":
        attach(model, PeftConfig(r=4), "")
        model.double()
    return model


def ran(model: Any, objective: Any, noisy: Any) -> float:
    """The operations of the loss and its backward pass, as PyTorch counts them, attention by plain products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective.loss(model, noisy).total.backward()
    return counter.get_total_flops()


def agree(counted: float, measured: float, trained: str) -> None:
    """Equal; with an adapter PyTorch leaves out the gradient of the first block's inputs, which nothing needs."""
    assert counted == measured if trained == "full" else measured <= counted <= 1.06 * measured


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize(("rows", "length", "answer"), [(1, 24, 8), (3, 40, 33)])
def test_masked_diffusion(trained: str, rows: int, length: int, answer: int) -> None:
    model = network(LLADA, LLADA_VALUES, trained)
    objective = MDLM(mask_token_id=39)
    noisy = objective.corrupt(batch(rows, length, answer), NoiseStream(1))
    agree(count_flops(model, LLADA, model.config)(objective.work(noisy)), ran(model, objective, noisy), trained)


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("conditioned", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "length", "answer"), [(1, 24, 8), (2, 40, 24)])
def test_canvas_diffusion(
    gemma_values: Callable[..., dict], trained: str, conditioned: float, rows: int, length: int, answer: int
) -> None:
    model = network(GEMMA, gemma_values(), trained)
    config = model.config
    objective = CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id,
                                self_conditioning_p=conditioned)  # fmt: skip
    noisy = objective.corrupt(batch(rows, length, answer), NoiseStream(1))
    count = count_flops(model, GEMMA, config)
    work = objective.work(noisy)
    twice = 2 * work.mixed * count.trained_head  # the predictions, made again for the gradient of what they mix
    agree(count(work), ran(model, objective, noisy) - twice, trained)


def test_a_window_hides_what_is_before_it() -> None:
    count = StepFlops(0, 0, 0, 0, 0, 0, attention=[(32, None), (32, 5)])
    seen = 8 * (8 + 20) + 8 * (8 + 4)
    assert count(Work((Pass(8, (20,), gradient=False),), 0)) == 4 * 32 * seen


def test_the_rate_of_a_device_without_an_entry_is_measured() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak.source == "measured" and 1e8 < peak.flops < 1e15


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
    ],
)  # fmt: skip
def test_a_known_device_has_its_makers_number(monkeypatch: pytest.MonkeyPatch, name: str, rate: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == Peak(rate, "table")


@pytest.mark.parametrize("name", ["NVIDIA GB200", "NVIDIA GeForce RTX 4090"])
def test_a_device_whose_name_holds_anothers_is_measured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "_measured", lambda *_: 1.0)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == Peak(1.0, "measured")
