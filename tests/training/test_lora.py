"""The `peft` section: which layers a pattern means, and what may be said."""

from __future__ import annotations

import pytest
import torch

from unmask.errors import ConfigError
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise
from unmask.sections import read_section
from unmask.training.lora import PeftConfig, attach, target_names

BLOCK = "model.transformer.blocks"
LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


@pytest.fixture
def model() -> LLaDA:
    ids = {"vocab_size": 30, "mask_token_id": 29, "eos_token_id": 28, "pad_token_id": 28}
    network = LLaDA(LLaDAConfig(d_model=16, n_heads=2, n_layers=2, mlp_hidden_size=24, **ids))  # type: ignore[arg-type]
    initialise(network, torch.Generator().manual_seed(0))
    return network


def names(model: LLaDA, *patterns: str) -> list[str]:
    return target_names(PeftConfig(target_modules=list(patterns) or None), model)


def test_patterns_over_full_names(model: LLaDA) -> None:
    every = [f"{BLOCK}.{n}.{kind}" for n in range(2) for kind in LINEARS]
    assert names(model) == every == names(model, "*")
    assert names(model, "*.q_proj") == names(model, "q_proj") == [f"{BLOCK}.0.q_proj", f"{BLOCK}.1.q_proj"]
    assert names(model, "*.blocks.1.ff_*") == [f"{BLOCK}.1.ff_proj", f"{BLOCK}.1.ff_out"]
    assert names(model, f"{BLOCK}.0.v_proj") == [f"{BLOCK}.0.v_proj"]
    assert names(model, "*.v_proj", "*.0.v_proj") == [f"{BLOCK}.0.v_proj", f"{BLOCK}.1.v_proj"]


@pytest.mark.parametrize("pattern", ["*.ff_out", "ff_out", "*ff_out"])
def test_ff_out_does_not_mean_the_head(pattern: str, model: LLaDA) -> None:
    assert names(model, pattern) == [f"{BLOCK}.0.ff_out", f"{BLOCK}.1.ff_out"]
    attach(model, PeftConfig(r=2, target_modules=[pattern]), "base")
    assert type(model.transformer.ff_out) is torch.nn.Linear
    assert not model.transformer.ff_out.weight.requires_grad


@pytest.mark.parametrize("pattern", ["*.qproj", "*.attn.q_proj", "model.transformer.ff_out", "*.wte", "*.attn_norm"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, model: LLaDA) -> None:
    with pytest.raises(ConfigError, match=r"peft.target_modules: .*matches no linear layer.*\*\.q_proj") as caught:
        names(model, "*.v_proj", pattern)
    assert repr(pattern) in str(caught.value) and "\n" not in str(caught.value)


def test_attach_follows_the_section(model: LLaDA) -> None:
    section = PeftConfig(r=3, lora_alpha=12, lora_dropout=0.5, target_modules=["*.k_proj"])
    config = attach(model, section, "some/base")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12, 0.5)
    assert config.base_model_name_or_path == "some/base"
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4
    assert {tuple(parameter.shape) for parameter in trained.values()} == {(3, 16), (16, 3)}
    layer = model.transformer.blocks[0].k_proj
    assert layer.scaling["default"] == 4.0  # type: ignore[union-attr, index]
    # The update is (alpha / r) · B · A, written out.
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(5, 16, generator=generator)
    down, up = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    expected = x @ layer.get_base_layer().weight.T + 4 * x @ down.T @ up.T  # type: ignore[union-attr, operator]
    model.eval()
    torch.testing.assert_close(layer(x), expected)  # type: ignore[operator]
    model.train()
    assert not torch.allclose(layer(x), expected)  # type: ignore[operator]  # dropout


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"r": 0}, "peft.r: must be at least 1"),
        ({"lora_alpha": 0}, "peft.lora_alpha: must be positive"),
        ({"lora_dropout": 1.0}, r"peft.lora_dropout: must lie in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "peft.lora_dropout"),
        ({"rank": 8}, "peft.rank: unknown key"),
        ({"target_modules": "*.q_proj"}, "peft.target_modules: expected a list"),
    ],
)
def test_bad_values_are_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_section(PeftConfig, values, "peft")
