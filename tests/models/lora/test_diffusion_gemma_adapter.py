"""DiffusionGemma's adapters: one on our stack is two in the reference class, under its own names, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DiffusionGemmaConfig as ReferenceConfig
from transformers import DiffusionGemmaForBlockDiffusion as Reference

from unmask.config.model import PeftConfig
from unmask.errors import ConfigError, ModelError
from unmask.models.loading import load_model
from unmask.models.lora.attach import merge_adapter
from unmask.models.lora.files import read_adapter, write_adapter
from unmask.training.export import export
from unmask.training.lora import attach, target_names

# PEFT asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY, CANVAS = 64, 8
LAYERS = "model.decoder.layers"
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("*.experts.gate_up_proj", "*.experts.down_proj")
TARGETS: dict[str, dict[str, Any]] = {
    "linears": {},
    "experts": {"target_parameters": list(EXPERTS)},
    "experts alone": {"target_modules": [], "target_parameters": ["*.experts.down_proj"], "use_rslora": True},
    "experts and norms": {"target_modules": [], "target_parameters": list(EXPERTS), "modules_to_save": ["*.norm"]},
    "dora and norms": {"use_dora": True, "modules_to_save": ["*norm", "*layernorm*"], "target_modules": ["*.q_proj"]},
    "self-conditioning": {"target_modules": ["*self_conditioning.*", "*.o_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, written by the reference class."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 1, "sliding_window": 6, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 16,
    }  # fmt: skip
    ids: dict[str, Any] = {"image_token_id": 60, "boi_token_id": 61, "eoi_token_id": 62}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reference(ReferenceConfig(text_config=text, vision_config=vision, canvas_length=CANVAS, **ids))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            # magnitudes and norms stay near what they are
            parameter.data = noise if "lora_A" in name or "lora_B" in name else parameter.data * (1 + noise)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, VOCABULARY, (2, 11), generator=generator)
    canvas = torch.randint(2, VOCABULARY, (2, CANVAS), generator=generator)
    return prompt, canvas, torch.randn(2, CANVAS, VOCABULARY, generator=generator)


def logits(model: Any) -> Tensor:
    prompt, canvas, previous = inputs()
    with torch.no_grad():
        return model.logits(model.decode(canvas, model.encode(prompt), model.soft_embedding(previous)))


def reference_logits(model: Any) -> Tensor:
    prompt, canvas, previous = inputs()
    with torch.no_grad():
        return model(input_ids=prompt, decoder_input_ids=canvas, self_conditioning_logits=previous).logits


def trained(base: Path, folder: Path, **fields: Any) -> tuple[nn.Module, Tensor]:
    """Return a network with a random adapter, written to `folder`, and its logits."""
    model = load_model(str(base))
    config = attach(model, PeftConfig(r=4, lora_alpha=8, **fields), str(base))
    randomise(model)
    folder.mkdir(exist_ok=True)
    write_adapter(model, config, folder)
    return model, logits(model)


@pytest.mark.parametrize("fields", TARGETS.values(), ids=TARGETS.keys())
def test_an_adapter_is_the_same_everywhere(base: Path, tmp_path: Path, fields: dict) -> None:
    model, expected = trained(base, tmp_path / "adapter", **fields)
    assert not torch.allclose(expected, logits(load_model(str(base))), atol=1e-2)
    assert torch.equal(logits(load_model(str(base), adapter=str(tmp_path / "adapter"))), expected)
    theirs = PeftModel.from_pretrained(Reference.from_pretrained(base), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(reference_logits(theirs), expected, atol=1e-4, rtol=1e-4)
    merge_adapter(model)
    assert list(model.state_dict()) == list(load_model(str(base)).state_dict())
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_an_export_with_experts_is_loaded_by_the_reference_class(base: Path, tmp_path: Path) -> None:
    _, expected = trained(base, tmp_path / "adapter", **TARGETS["experts"])
    export(str(base), tmp_path / "merged", str(tmp_path / "adapter"))
    merged = Reference.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(reference_logits(merged), expected, atol=1e-4, rtol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    kinds = {name.split(".", 4)[-1] for name in changed}
    linears = {f"self_attn.{kind}_proj.weight" for kind in "qkvo"} | {f"{kind}.weight" for kind in DENSE}
    assert kinds == linears | {"experts.gate_up_proj", "experts.down_proj"}


def test_the_export_of_a_bf16_base_rounds_once(base: Path, tmp_path: Path) -> None:
    export(str(base), tmp_path / "bf16", dtype="bfloat16")
    trained(tmp_path / "bf16", tmp_path / "adapter", **TARGETS["experts"])
    for dtype in (None, "float32"):
        export(str(tmp_path / "bf16"), tmp_path / f"{dtype}", str(tmp_path / "adapter"), dtype)
    rounded, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("None", "float32"))
    text = [name for name in rounded if "vision" not in name]
    assert all(exact[name].dtype == torch.float32 for name in text)
    for name in text:
        assert torch.equal(rounded[name], exact[name].bfloat16()), name


def test_the_file_holds_both_roles_and_the_card_warns(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path, **TARGETS["experts"])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    decoder = {key for key in stored if ".model.decoder.layers." in key}
    twins = {key.replace(".model.decoder.", ".model.encoder.language_model.") for key in decoder}
    assert set(stored) == decoder | twins and len(decoder) == 2 * (3 + 4 + 3 + 3 + 2 * 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("target_modules", "target_parameters"):
        assert {name.split(".layers.")[0] for name in config[field]} == {
            "model.decoder",
            "model.encoder.language_model",
        }
    card = (tmp_path / "README.md").read_text()
    assert "unmask export" in card and "doubles the update" in card and f"base_model: {base}" in card


def test_copies_that_differ_are_refused(base: Path, tmp_path: Path) -> None:
    """As PEFT trains them on the reference class, where the two roles' adapters are apart."""
    model, _ = trained(base, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in stored if "language_model.layers.1.self_attn.q_proj.lora_B" in key)
    save_file({**stored, key: stored[key] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="differs from .*both are of one weight") as caught:
        read_adapter(model, tmp_path)
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("role", [".model.decoder.layers.", ".language_model.layers."])
def test_an_adapter_of_one_role_alone_is_refused(role: str, base: Path, tmp_path: Path) -> None:
    model, _ = trained(base, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: value for key, value in stored.items() if role in key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="it was trained on one role alone"):
        read_adapter(model, tmp_path)


def test_what_adapts_the_vision_tower_is_refused(base: Path, tmp_path: Path) -> None:
    theirs = get_peft_model(
        Reference.from_pretrained(base), LoraConfig(target_modules=r".*vision_tower.*q_proj.*linear")
    )
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="adapter: .*vision_tower.*not in this one"):
        load_model(str(base), adapter=str(tmp_path))


def test_an_adapter_of_another_family_is_refused(base: Path, fixtures: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    with pytest.raises(ModelError, match="was made for another network .*decoder.layers.0") as caught:
        load_model(str(fixtures / "llada_tiny"), adapter=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_target_parameters_that_name_other_matrices_are_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path, **TARGETS["experts"])
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(ModelError, match="its tensors adapt 2 matrices .* its target_parameters name 1"):
        load_model(str(base), adapter=str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match any targeted module:RuntimeWarning")  # they do
def test_ranks_and_alphas_of_their_own_are_pefts(base: Path, tmp_path: Path) -> None:
    """Experts of one stack may have an alpha of their own, if both matrices have it."""
    trained(base, tmp_path, **TARGETS["experts"])
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    patterns = {r"experts\.(gate_up|down)_proj": 3, r".*layers\.1\.self_attn\.q_proj": 30}
    path.write_text(json.dumps(values | {"alpha_pattern": patterns}))
    theirs = PeftModel.from_pretrained(Reference.from_pretrained(base), str(tmp_path)).eval()
    found = logits(load_model(str(base), adapter=str(tmp_path)))
    torch.testing.assert_close(found, reference_logits(theirs), atol=1e-4, rtol=1e-4)
    path.write_text(json.dumps(values))
    assert not torch.allclose(logits(load_model(str(base), adapter=str(tmp_path))), found, atol=1e-3)
    path.write_text(json.dumps(values | {"alpha_pattern": {"experts.down_proj": 3}}))
    with pytest.raises(ModelError, match="experts have ranks or alphas of their own, which is not supported"):
        load_model(str(base), adapter=str(tmp_path))


def test_patterns_that_tell_the_roles_apart_are_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"alpha_pattern": {r"model\.decoder\..*q_proj": 3}}))
    with pytest.raises(ModelError, match="alpha_pattern tells apart model.decoder.* and model.encoder") as caught:
        load_model(str(base), adapter=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_names_of_other_networks_are_no_matter(base: Path, tmp_path: Path) -> None:
    _, expected = trained(base, tmp_path, **TARGETS["experts"])
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    lists = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "qkv", *DENSE],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "feed_forward.experts.w1"],
        "exclude_modules": r".*(vision_tower|self_conditioning).*",
    }
    path.write_text(json.dumps(values | lists))
    assert torch.equal(logits(load_model(str(base), adapter=str(tmp_path))), expected)


def test_what_is_adapted_by_default(base: Path) -> None:
    names = target_names(PeftConfig(), load_model(str(base)))
    sliding = [f"{LAYERS}.0.self_attn.{kind}_proj" for kind in "qkvo"]
    full = [f"{LAYERS}.1.self_attn.{kind}_proj" for kind in "qko"]
    assert sorted(names) == sorted(sliding + full + [f"{LAYERS}.{n}.{kind}" for n in (0, 1) for kind in DENSE])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": ["*.router.proj"]}, "router stays frozen"),
        ({"target_modules": ["router.*"]}, "router stays frozen"),
        ({"target_modules": ["lm_head"]}, "the head is the embedding"),
        ({"target_modules": ["*embed_tokens"]}, "also the head"),
        ({"target_modules": ["*vision_tower*"]}, "no part in training on text"),
        ({"target_modules": ["*.experts.down_proj"]}, "target_parameters"),
        ({"target_modules": ["*.qproj"]}, r"there are \*\.down_proj, .*\*\.v_proj"),
        ({"exclude_modules": ["*self_conditioning*"]}, "that target_modules takes"),
        ({"exclude_modules": ["*"]}, "leaves no linear layer"),
        ({"target_parameters": ["*.mlp.down_proj"]}, r"no stack of experts; there are \*\.experts\.down_proj"),
        ({"modules_to_save": ["*embed_tokens"]}, "also the head"),
        ({"modules_to_save": ["*.router"]}, "router stays frozen"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(base: Path, fields: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"peft.{next(iter(fields))}: .*{named}") as caught:
        attach(load_model(str(base)), PeftConfig(**fields), "base")
    assert "\n" not in str(caught.value)


def test_the_router_has_no_gradient_and_checkpointing_changes_nothing(base: Path) -> None:
    prompt, canvas, _ = inputs()

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model: Any = load_model(str(base)).train()
        attach(model, PeftConfig(r=4, **TARGETS["experts"]), "base")
        randomise(model)
        model.stack.activation_checkpointing = checkpointing
        model.decode(canvas, model.encode(prompt)).sin().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and all("lora_" in name for name in plain)
    assert sum(".experts." in name for name in plain) == 8
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, checkpointed[name], atol=1e-6, rtol=1e-5)
