"""LoRA adapters in PEFT's format: what is written is read back, by PEFT too; misfits are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from unmask.errors import ModelError
from unmask.models.folders import find_adapter
from unmask.models.llada.auto import register
from unmask.models.loading import load_model
from unmask.models.lora.attach import attach_adapter, load_adapter, merge_adapter
from unmask.models.lora.files import read_adapter, write_adapter

# PEFT asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
TARGETS = [f"model.transformer.blocks.{n}.{kind}" for n in range(3) for kind in ("q_proj", "ff_out")]


def lora(**fields) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | fields))  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS))  # type: ignore[operator]


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            # magnitudes, norms and embeddings stay near what they are
            parameter.data = noise if "lora_A" in name or "lora_B" in name else parameter.data * (1 + noise)


WHOLE = ["model.transformer.ln_f", "model.transformer.blocks.1.attn_norm"]
KINDS = {
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": WHOLE},
    "all": {"use_dora": True, "use_rslora": True, "modules_to_save": WHOLE},
    "head and embedding": {"modules_to_save": ["model.transformer.ff_out", "model.transformer.wte"]},
}


@pytest.fixture
def adapted(reference_model, reference_folder: Path):
    """The reference model with a random adapter."""
    attach_adapter(reference_model, lora(base_model_name_or_path=str(reference_folder)))
    randomise(reference_model)
    return reference_model


@pytest.fixture
def folder(adapted, reference_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    write_adapter(adapted, lora(base_model_name_or_path=str(reference_folder)), path)
    return path


def test_a_fresh_adapter_changes_nothing_and_alone_gets_gradients(reference_model) -> None:
    before = logits(reference_model)
    attach_adapter(reference_model, lora())
    assert torch.equal(logits(reference_model), before)
    reference_model.train()
    reference_model(TOKENS).sin().sum().backward()
    trained = [name for name, parameter in reference_model.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, parameter in reference_model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(TARGETS) and all("lora_" in name for name in trained)


def test_adapters_of_a_bf16_network_are_fp32(reference_folder: Path) -> None:
    model = load_model(str(reference_folder), "bfloat16")
    attach_adapter(model, lora())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    randomise(model)
    assert torch.isfinite(logits(model)).all()


def test_round_trip(adapted, folder: Path, reference_folder: Path) -> None:
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    again = load_model(str(reference_folder), adapter=str(folder))
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.allclose(logits(again), logits(load_model(str(reference_folder))), atol=1e-2)
    randomise(again, seed=5)
    read_adapter(again, folder)
    assert torch.equal(logits(again), logits(adapted))


def test_peft_itself_reads_what_is_written(adapted, folder: Path, reference_folder: Path) -> None:
    register()
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(reference_folder), str(folder))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, logits(adapted))


def test_what_peft_writes_is_read(reference_folder: Path, tmp_path: Path) -> None:
    register()
    theirs = get_peft_model(AutoModel.from_pretrained(reference_folder), lora(target_modules=["k_proj", "up_proj"]))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(load_model(str(reference_folder), adapter=str(tmp_path))), expected)


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_every_kind_is_the_same_trained_read_by_peft_and_merged(
    fields: dict, reference_model, reference_folder: Path, tmp_path: Path
) -> None:
    before = logits(reference_model)
    config = lora(base_model_name_or_path=str(reference_folder), **fields)
    attach_adapter(reference_model, config)
    torch.testing.assert_close(logits(reference_model), before, atol=1e-5, rtol=1e-5)  # a fresh one is neutral
    randomise(reference_model)
    expected = logits(reference_model)
    assert not torch.allclose(expected, before, atol=1e-2)
    write_adapter(reference_model, config, tmp_path)
    assert torch.equal(logits(load_model(str(reference_folder), adapter=str(tmp_path))), expected)
    register()
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(reference_folder), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    merge_adapter(reference_model)
    assert list(reference_model.state_dict()) == list(load_model(str(reference_folder)).state_dict())
    torch.testing.assert_close(logits(reference_model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_a_frozen_bf16_base_trains_fp32_adapters(fields: dict, autocast: bool, reference_folder: Path) -> None:
    model: Any = load_model(str(reference_folder), "bfloat16").train()
    before = model(TOKENS)
    attach_adapter(model, lora(**fields))
    # A fresh adapter is neutral in bf16 too; DoRA's scale m / |W| is one to fp32's rounding, not to bf16's.
    torch.testing.assert_close(model(TOKENS), before, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(TOKENS)
        (hidden.float().sin().sum() + model.logits(hidden).float().sin().sum()).backward()
    for name, parameter in model.named_parameters():
        whole_matrix = "modules_to_save" in name and parameter.dim() == 2
        fp32 = parameter.requires_grad and not whole_matrix
        assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype and torch.isfinite(parameter.grad).all()


def test_a_fresh_dora_on_a_bf16_base_takes_its_magnitudes_in_fp32(reference_folder: Path) -> None:
    model: Any = load_model(str(reference_folder), "bfloat16")
    norms = {name: model.get_submodule(name).weight.float().norm(dim=1) for name in TARGETS}
    attach_adapter(model, lora(use_dora=True))
    for name, norm in norms.items():
        magnitude = model.get_submodule(name).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude.data, norm, atol=1e-6, rtol=1e-6)


def test_merging_changes_nothing_but_rounding(adapted, reference_model, reference_folder: Path) -> None:
    expected = logits(adapted)
    merge_adapter(adapted)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    plain = load_model(str(reference_folder))
    assert list(adapted.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in adapted.parameters())
    changed = {
        name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])
    }
    assert changed == {f"{target}.weight" for target in TARGETS}


def test_an_adapter_of_another_network_is_refused(folder: Path, network, tmp_path: Path) -> None:
    narrow = network()  # other widths
    with pytest.raises(ModelError, match="adapter: .* has shape|made for another network"):
        load_adapter(narrow, folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    values = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(values | {"target_modules": ["self_attn.qkv"]}))
    with pytest.raises(ModelError, match="made for another network") as caught:
        load_adapter(network(), other)
    assert str(other) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_surplus_adapter_tensors_are_named(reference_folder: Path, folder: Path) -> None:
    values = json.loads((folder / "adapter_config.json").read_text())
    for targets in (TARGETS[:-1], [*TARGETS, "model.transformer.blocks.0.v_proj"]):
        (folder / "adapter_config.json").write_text(json.dumps(values | {"target_modules": targets}))
        with pytest.raises(ModelError, match=r"first: base_model.model.model.transformer.blocks.\d"):
            load_model(str(reference_folder), adapter=str(folder))


def test_an_adapted_head_is_refused_not_ignored(reference_folder: Path, tmp_path: Path) -> None:
    """PEFT matches `ff_out` by suffix, so it adapts the head as well, which the loss reads as a matrix."""
    register()
    theirs = get_peft_model(AutoModel.from_pretrained(reference_folder), lora(target_modules=["ff_out"]))
    theirs.save_pretrained(str(tmp_path))
    assert any("transformer.ff_out" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ModelError, match="adapts 'base_model.model.model.transformer.ff_out"):
        load_model(str(reference_folder), adapter=str(tmp_path))


def test_damaged_adapters_are_named(reference_folder: Path, folder: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            load_model(str(reference_folder), adapter=str(folder))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-7])
    refused("not a whole safetensors file")
    weights.write_bytes(whole)
    config.write_text(text[:50])
    refused("not valid JSON")
    config.write_text(json.dumps({"peft_type": "IA3"}))
    refused("peft_type 'IA3'; only LORA")
    config.unlink()
    refused("is no adapter: it needs adapter_config.json")


def test_a_run_directory_stands_for_its_latest_adapter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").symlink_to(folder)
    assert find_adapter(tmp_path / "run") == tmp_path / "run" / "latest"
    assert find_adapter(folder) == folder
