"""Adapters as PEFT writes them for others: their tensors say where they are, their logits are PEFT's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from unmask.errors import ModelError
from unmask.models.llada.auto import register
from unmask.models.loading import empty_network, load_model
from unmask.models.lora.adapter_config import FIELDS, AdapterConfig
from unmask.models.lora.attach import load_adapter
from unmask.models.lora.files import adapter_state
from unmask.models.registry import plan_folder
from unmask.training.export import export

# PEFT asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
QV = ["q_proj", "v_proj"]
# Published lists that name modules which LLaDA lacks: d1's (adapter_d1), and NeMo AutoModel's.
D1 = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
AUTOMODEL = ["q_proj", "k_proj", "v_proj", "att_proj", "attn_out", "ff_proj", "up_proj"]
LAYERS = "model.transformer.blocks"
CASES: dict[str, dict[str, Any]] = {
    "d1's list": {"target_modules": D1},
    "automodel's list": {"target_modules": AUTOMODEL},
    "layers": {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "blocks"},
    "one layer": {"target_modules": QV, "layers_to_transform": 2},
    "no layers left out": {"target_modules": QV, "layers_to_transform": [], "layer_replication": None},
    "all linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*blocks\.[02]\.(q_proj|attn_out)"},
    "excluded": {"target_modules": QV, "exclude_modules": ["blocks.0.q_proj"]},
    "excluded by expression": {"target_modules": QV, "exclude_modules": r".*\.1\..*"},
    "ranks": {"target_modules": QV, "rank_pattern": {"q_proj": 2, f"{LAYERS}.1.v_proj": 6}},
    "alphas": {"target_modules": QV, "alpha_pattern": {r"blocks\.[01]\.q_proj": 3, "nothing": 5}, "use_rslora": True},
    "ranks and alphas": {"target_modules": QV, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 40}},
    "modules to save": {"target_modules": QV, "modules_to_save": ["ln_f", "classifier", "lm_head"]},
    "head": {"target_modules": QV, "modules_to_save": ["transformer.ff_out"]},
    "biases of a network that has none": {"target_modules": QV, "bias": "all"},
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": QV, "init_lora_weights": "orthogonal"},
    "eva": {"target_modules": QV, "init_lora_weights": "eva"},
    "mica": {"target_modules": QV, "init_lora_weights": "mica"},
    "drawn": {"target_modules": QV, "init_lora_weights": False},
    "pissa": {"target_modules": QV, "init_lora_weights": "pissa"},
    "pissa of ranks": {"target_modules": QV, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 3}},
    "olora": {"target_modules": QV, "init_lora_weights": "OLoRA", "use_rslora": True},
    "dora": {"target_modules": QV, "use_dora": True, "lora_dropout": 0.3, "fan_in_fan_out": True},
}  # fmt: skip


@pytest.fixture
def trained(reference_folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Tensor]]:
    """Return a function that trains an adapter with PEFT, as it were: its folder and PEFT's logits."""

    def train(**fields: Any) -> tuple[Path, Tensor]:
        register()
        base = AutoModel.from_pretrained(reference_folder, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**{"r": 8, "lora_alpha": 16, **fields}))
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
        folder = tmp_path / "adapter"
        model.save_pretrained(str(folder))
        with torch.no_grad():
            return folder, model.eval()(input_ids=TOKENS).logits

    return train


def logits(base: Path, adapter: Path) -> Tensor:
    model: Any = load_model(str(base), adapter=str(adapter))
    with torch.no_grad():
        return model.logits(model(TOKENS))


def rewrite(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({new_name(key): tensor for key, tensor in load_file(path).items()}, path)


def refused(base: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(base), adapter=str(adapter))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*eva:UserWarning")
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_logits_are_pefts(fields: dict, trained, reference_folder: Path) -> None:
    folder, expected = trained(**fields)
    assert not torch.allclose(expected, logits_of_base(reference_folder), atol=1e-2)
    torch.testing.assert_close(logits(reference_folder, folder), expected, atol=1e-4, rtol=1e-4)


def logits_of_base(folder: Path) -> Tensor:
    model: Any = load_model(str(folder))
    with torch.no_grad():
        return model.logits(model(TOKENS))


def test_the_published_configuration_of_d1_is_taken(trained, fixtures: Path, reference_folder: Path) -> None:
    """It has no more than PEFT of its time wrote; a list of names from LLaMA, of which LLaDA has four."""
    folder, expected = trained(target_modules=D1)
    published = json.loads((fixtures / "reports" / "adapter_d1" / "adapter_config.json").read_text())
    assert sorted(published["target_modules"]) == sorted(D1)
    (folder / "adapter_config.json").write_text(json.dumps(published))
    torch.testing.assert_close(logits(reference_folder, folder), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_peft_converted_is_plain(start: str, reference_folder: Path, tmp_path: Path) -> None:
    register()
    base = AutoModel.from_pretrained(reference_folder, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=QV, init_lora_weights=start))  # type: ignore[arg-type]
    model.peft_config["default"].init_lora_weights = True  # type: ignore[index] - as PEFT's documentation has it
    model.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
        expected = model.eval()(input_ids=TOKENS).logits
    model.peft_config["default"].init_lora_weights = start  # type: ignore[index]
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(logits(reference_folder, tmp_path / "plain"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_a_start_that_cannot_be_made_again_is_refused_with_the_remedy(start: str, trained, reference_folder) -> None:
    folder, _ = trained(target_modules=QV, init_lora_weights=start if start.startswith("pissa") else True)
    rewrite(folder, init_lora_weights=start)
    message = refused(reference_folder, folder)
    assert f"adapter_config.json: init_lora_weights='{start}' is not supported" in message
    assert "path_initial_model_for_weight_conversion" in message
    rewrite(folder, init_lora_weights="mystery")
    assert "init_lora_weights='mystery' is not known" in refused(reference_folder, folder)


def test_a_start_inside_the_base_is_not_applied_to_a_network_without_weights(trained, reference_folder: Path) -> None:
    """Several processes share the base in parts, and attach the adapter before there are any."""
    folder, _ = trained(target_modules=QV, init_lora_weights="pissa")
    plan = plan_folder(str(reference_folder), "x")
    with torch.device("meta"):
        network = empty_network(plan.family, plan.config)
    with pytest.raises(ModelError, match="use one process, or merge it first"):
        load_adapter(network, folder)


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module.{}", "base_model.model.{}"])
def test_wrappers_names_in_an_adapter_are_no_matter(wrapped: str, trained, reference_folder: Path) -> None:
    folder, expected = trained(target_modules=QV)
    rename(folder, lambda key: wrapped.format(key))
    torch.testing.assert_close(logits(reference_folder, folder), expected, atol=1e-4, rtol=1e-4)
    rename(folder, lambda key: key.replace(".q_proj.", "._orig_mod.q_proj."))
    torch.testing.assert_close(logits(reference_folder, folder), expected, atol=1e-4, rtol=1e-4)
    path = folder / "adapter_model.safetensors"
    twice = load_file(path)
    save_file(twice | {f"module.{key}": tensor.clone() for key, tensor in twice.items()}, path)
    assert "which are one tensor" in refused(reference_folder, folder)


DISAGREE: dict[str, dict[str, Any]] = {
    "another layer": {"layers_to_transform": [0]},
    "fewer layers": {"layers_to_transform": [0, 1]},
    "another pattern": {"layers_to_transform": [0, 1, 2], "layers_pattern": "h"},
    "fewer modules": {"target_modules": ["q_proj"]},
    "more modules": {"target_modules": [*QV, "k_proj"]},
    "other modules": {"target_modules": ["qkv"]},
    "an expression": {"target_modules": r".*\.q_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "whole modules": {"modules_to_save": ["ln_f"]},
}


@pytest.mark.parametrize("fields", DISAGREE.values(), ids=DISAGREE.keys())
def test_a_configuration_that_peft_would_read_as_another_adapter_is_refused(
    fields: dict, trained, reference_folder: Path
) -> None:
    folder, _ = trained(target_modules=QV)
    rewrite(folder, **fields)
    message = refused(reference_folder, folder)
    assert "its tensors and its adapter_config.json disagree (first: base_model.model.model.transformer." in message


def test_trained_biases_are_refused_by_tensor(network, tmp_path: Path) -> None:
    register()
    values = {name: value for name, value in vars(network(include_qkv_bias=True).config).items() if value is not None}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llada", **values}))
    save_file(network(include_qkv_bias=True).state_dict(), base / "model.safetensors", {"format": "pt"})
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules=QV, bias="lora_only"))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert "q_proj" in (said := refused(base, tmp_path / "adapter")) and "biases stay frozen" in said


def test_every_field_of_pefts_configuration_is_in_the_table() -> None:
    installed = {field.name for field in dataclasses.fields(LoraConfig)}
    assert installed <= FIELDS.keys()
    read = {field.name for field in dataclasses.fields(AdapterConfig)}
    assert read == {name for name, field in FIELDS.items() if field.types} - {"peft_type"} <= installed
    defaults, ours = LoraConfig(), AdapterConfig()
    assert all(getattr(ours, name) == getattr(defaults, name) for name in read)


def test_everything_at_its_default_is_taken(trained, reference_folder: Path) -> None:
    folder, expected = trained(target_modules=QV)
    stored = json.loads((folder / "adapter_config.json").read_text())
    unset = {"velora_config": None, "lora_bias": False, "layer_replication": [], "alora_invocation_tokens": []}
    new = {"a_field_of_tomorrow": None, "and_another": False, "and_a_list": [], "and_a_mapping": {}, "and_a_word": ""}
    null = {"rank_pattern": None, "use_dora": None, "init_lora_weights": None}  # which PEFT takes as its defaults
    rewrite(folder, **unset, **new, **null, runtime_config={"ephemeral_gpu_offload": False})
    assert {field.name for field in dataclasses.fields(LoraConfig)} - stored.keys() <= {"runtime_config"}
    torch.testing.assert_close(logits(reference_folder, folder), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.refused])
def test_what_computes_otherwise_is_refused_by_name(name: str, trained, reference_folder: Path) -> None:
    folder, _ = trained(target_modules=QV)
    for value in (True, {}, [1], {"x": 1}):
        rewrite(folder, **{name: value, "a_field_of_tomorrow": 3})
        message = refused(reference_folder, folder)
        assert f"adapter_config.json: {name}=" in message or f"; {name}=" in message
        assert "a_field_of_tomorrow=3 is not supported (a field that is not known here)" in message
        assert "merge_and_unload" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", True), ("r", None), ("r", 8.0), ("lora_alpha", "16"), ("use_dora", "yes"), ("use_rslora", 1),
        ("target_modules", [1]), ("target_modules", {"q": 1}), ("exclude_modules", 5), ("layers_to_transform", "1"),
        ("layers_to_transform", ["1"]), ("layers_pattern", 3), ("modules_to_save", "x"), ("rank_pattern", {"q": "2"}),
        ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": None}), ("target_parameters", "experts"),
        ("init_lora_weights", 5),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(field: str, value: object, trained, reference_folder: Path) -> None:
    folder, _ = trained(target_modules=QV)
    rewrite(folder, **{field: value})
    assert f"adapter_config.json: {field} cannot be {value!r}; copy" in refused(reference_folder, folder)


def test_a_rank_that_no_tensor_has_is_refused_before_memory_is_taken(trained, reference_folder: Path) -> None:
    folder, _ = trained(target_modules=QV)
    for rank in (9, 10**12, 10**30):
        rewrite(folder, r=rank)
        assert "and no tensor has more than 8 rows" in refused(reference_folder, folder)
    rewrite(folder, r=4)
    assert "has shape (8, 64), not (4, 64)" in refused(reference_folder, folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(q_proj"}, {"exclude_modules": "*"}, {"rank_pattern": {"(": 2}}, {"modules_to_save": ["("]},
        {"layers_to_transform": [0], "layers_pattern": "("},
    ],
    ids=str,
)  # fmt: skip
def test_patterns_that_are_none_are_refused(fields: dict, trained, reference_folder: Path) -> None:
    folder, _ = trained(target_modules=QV)
    rewrite(folder, **fields)
    assert re.search(r"adapter_config.json: '.*' is no regular expression", refused(reference_folder, folder))


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_pickled_adapter_is_named(name: str, trained, reference_folder: Path) -> None:
    folder, _ = trained(target_modules=QV)
    (folder / "adapter_model.safetensors").rename(folder / name)
    message = refused(reference_folder, folder)
    assert "is no adapter" in message and f"; {name} is a pickle, which is not read, since it may run code" in message


@pytest.mark.parametrize("start", [True, "pissa"])
def test_merging_gives_the_same_logits(start: bool | str, trained, reference_folder: Path, tmp_path: Path) -> None:
    folder, expected = trained(target_modules=QV, rank_pattern={"q_proj": 2}, init_lora_weights=start)
    export(str(reference_folder), tmp_path / "merged", str(folder))
    torch.testing.assert_close(logits_of_base(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)


def test_the_tensors_of_another_tools_adapter_survive_our_writer(trained, reference_folder: Path) -> None:
    folder, _ = trained(target_modules=QV, rank_pattern={"q_proj": 2}, modules_to_save=["ln_f"])
    stored = load_file(folder / "adapter_model.safetensors")
    ours = adapter_state(load_model(str(reference_folder), adapter=str(folder)))
    assert sorted(ours) == sorted(stored) and all(torch.equal(ours[key], stored[key]) for key in stored)
