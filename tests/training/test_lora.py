"""The `peft` section: which layers a pattern means, and what may be said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unmask.config.model import PeftConfig
from unmask.config.reader import read_section
from unmask.errors import ConfigError
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise
from unmask.prepare import check_quantization
from unmask.training.lora import attach, target_names

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
    assert type(model.transformer.ff_out) is nn.Linear
    assert not model.transformer.ff_out.weight.requires_grad


@pytest.mark.parametrize("pattern", ["*.qproj", "*.attn.q_proj", "model.transformer.ff_out", "*.wte", "*.attn_norm"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, model: LLaDA) -> None:
    with pytest.raises(ConfigError, match=r"peft.target_modules: .*matches no linear layer.*\*\.q_proj") as caught:
        names(model, "*.v_proj", pattern)
    assert repr(pattern) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_refuses_it_before_the_weights_are_read(tiny, train_tiny, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("unmask.training.network.build_model", lambda *_, **__: pytest.fail("weights were read"))
    values = tiny.config(tmp_path, peft={"target_modules": ["*.qproj"]})
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    with pytest.raises(ConfigError, match="'\\*.qproj' matches no linear layer"):
        train_tiny(values)


def test_excluded_layers_are_left_out(model: LLaDA) -> None:
    section = PeftConfig(exclude_modules=["*.ff_*", "0.q_proj"])
    kinds = [kind for kind in LINEARS if not kind.startswith("ff_")]
    kept = [f"{BLOCK}.{n}.{kind}" for n in range(2) for kind in kinds]
    assert target_names(section, model) == [name for name in kept if name != f"{BLOCK}.0.q_proj"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modules_to_save": ["*.q_proj"]}, r"matches no module that can be trained whole; .*\*\.ln_f"),
        ({"target_parameters": ["*.experts.*"]}, "matches no stack of experts; this model has none"),
        ({"exclude_modules": ["*.wte"]}, "matches no linear layer that target_modules takes"),
        ({"target_modules": ["*.wte"]}, "the embedding is a lookup"),
        ({"target_modules": ["model.transformer.ff_out"]}, "the head is read as a matrix"),
    ],
)
def test_what_this_model_has_not_is_refused(fields: dict, named: str, model: LLaDA) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        attach(model, PeftConfig(**fields), "base")
    assert str(caught.value).startswith(f"peft.{next(iter(fields))}: ") and "\n" not in str(caught.value)


def test_a_tied_embedding_is_not_trained_whole() -> None:
    ids = {"vocab_size": 30, "mask_token_id": 29, "eos_token_id": 28, "pad_token_id": 28}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 24, "weight_tying": True}
    with pytest.raises(ConfigError, match=r"modules_to_save: '\*wte' matches no module"):
        attach(LLaDA(LLaDAConfig(**sizes, **ids)), PeftConfig(modules_to_save=["*wte"]), "")  # type: ignore[arg-type]


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
        ({"target_modules": []}, r"peft.target_modules: \[\] adapts nothing"),
        ({"target_parameters": ["*.experts.*"], "use_dora": True}, "peft.use_dora: experts take plain"),
        ({"target_parameters": ["*.experts.*"], "lora_dropout": 0.1}, "peft.lora_dropout: experts take no dropout"),
    ],
)
def test_bad_values_are_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_section(PeftConfig, values, "peft")


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    section = PeftConfig(load_in_4bit=True)
    check_quantization(section, 1)
    with pytest.raises(ConfigError, match="peft.load_in_4bit: works on one device, and 2 processes"):
        check_quantization(section, 2)
    monkeypatch.setattr("unmask.prepare.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft.load_in_4bit: needs bitsandbytes; .*pip install 'unmask\[quant\]'"):
        check_quantization(section, 1)
    for fine in (PeftConfig(), None):
        check_quantization(fine, 2)
