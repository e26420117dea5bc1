"""DiffusionGemma's config.json: the released one, transformers' spellings, and everything that is refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from unmask.config.model import ModelConfig
from unmask.errors import ModelError
from unmask.models.diffusion_gemma.config import FULL, SLIDING, DiffusionGemmaConfig
from unmask.models.diffusion_gemma.family import FAMILY, parse_config
from unmask.models.loading import empty_network
from unmask.models.registry import plan_model

Values = Callable[..., dict]


@pytest.fixture(scope="module")
def released(fixtures: Path) -> dict[str, Any]:
    return json.loads((fixtures / "diffusiongemma_26b_a4b_it" / "config.json").read_text())


def text(values: dict, **changes: object) -> dict:
    return {**values, "text_config": {**values["text_config"], **changes}}


def without(values: dict, *names: str) -> dict:
    return {**values, "text_config": {k: v for k, v in values["text_config"].items() if k not in names}}


def test_the_released_configuration(released: dict) -> None:
    assert parse_config(released, "config.json") == DiffusionGemmaConfig(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        layer_types=((SLIDING,) * 5 + (FULL,)) * 5,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        full_num_key_value_heads=2,
        full_head_dim=512,
        sliding_window=1024,
        sliding_rope_theta=1e4,
        full_rope_theta=1e6,
        full_rotary_factor=0.25,
        max_position_embeddings=262_144,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        canvas_length=256,
        eos_token_id=1,
        eos_token_ids=(1, 106, 50),
        pad_token_id=0,
        initializer_range=0.02,
    )


def test_the_released_network_has_25_billion_parameters_under_the_released_names(released: dict, fixtures) -> None:
    config = parse_config(released, "config.json")
    assert (config.rows, config.max_sequence_length) == (262_144, 262_144)
    assert config.heads(SLIDING) == (8, 256) and config.heads(FULL) == (2, 512)
    with torch.device("meta"):
        model = empty_network(FAMILY, config)
    width, sliding, full = 2816, 25, 5
    attention = sliding * (2 * 16 + 2 * 8) * 256 * width + full * (2 * 16 + 2) * 512 * width
    norms = 30 * 7 * width + sliding * 2 * 256 + full * 2 * 512 + 2 * width
    experts = 128 * 3 * 704 * width + 128 * width + width + 128
    dense = 3 * 2112 * width
    by_hand = 262_144 * width + attention + norms + 30 * (experts + dense) + dense
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 25_250_986_752
    # The tiny checkpoint's names, layer numbers aside, are these: full layers lack v_proj, nothing else differs.
    with safe_open(fixtures / "diffusion_gemma_step" / "model.safetensors", framework="pt") as file:
        stored = {key for key in file.keys() if not FAMILY.files.passthrough(key)}  # noqa: SIM118
    kinds = {0: [n for n in range(30) if n % 6 != 5], 1: range(5, 30, 6)}
    expected = {
        key.replace(".layers.0.", f".layers.{n}.") for n in kinds[0] for key in stored if ".layers.1." not in key
    }
    expected |= {key.replace(".layers.1.", f".layers.{n}.") for n in kinds[1] for key in stored if ".layers.1." in key}
    assert set(model.state_dict()) == expected


def test_what_transformers_writes_back_parses_equal(released: dict, tmp_path: Path) -> None:
    """It spells head sizes of full layers as per_layer_config, and adds the defaults of every field."""
    from transformers import DiffusionGemmaConfig as Reference

    Reference(**{key: value for key, value in released.items() if key != "model_type"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in written["text_config"] and "global_head_dim" not in written["text_config"]
    assert parse_config(written, "config.json") == parse_config(released, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_head_dim": 8, "num_global_key_value_heads": 2},  # then per_layer_config changes nothing
        {"num_global_key_value_heads": None},
        {"layer_types": None, "num_hidden_layers": 8},
        {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
        {"final_logit_softcapping": 7.5, "rms_norm_eps": 1e-3, "sliding_window": 77},
        {"eos_token_id": [3, 4], "pad_token_id": 5},
    ],
    ids=str,
)
def test_both_spellings_parse_equal(changes: dict, gemma_values: Values, tmp_path: Path) -> None:
    from transformers import DiffusionGemmaConfig as Reference

    values = gemma_values(**changes)
    Reference(**{key: value for key, value in values.items() if key != "model_type"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert parse_config(written, "config.json") == parse_config(values, "config.json")


def test_defaults_are_transformers(gemma_values: Values) -> None:
    from transformers import DiffusionGemmaConfig as Reference

    sizes = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    with warnings.catch_warnings():
        written = Reference(text_config=dict(sizes)).to_dict()
    assert parse_config({"text_config": sizes}, "here") == parse_config(written, "config.json")


def test_ids_that_end_an_answer(released: dict) -> None:
    one = parse_config({k: v for k, v in released.items() if k != "eos_token_id"}, "config.json")
    assert (one.eos_token_id, one.eos_token_ids) == (1, (1,))
    several = parse_config(text({**released, "eos_token_id": 106}, eos_token_id=[106, 1]), "config.json")
    assert (several.eos_token_id, several.eos_token_ids) == (106, (106,))


def test_a_run_may_give_the_fields_inline(gemma_values: Values) -> None:
    plan = plan_model(ModelConfig(config=gemma_values()))
    assert plan.config == parse_config(gemma_values(), "model.config")
    assert plan.family is FAMILY and plan.config_json["architectures"] == ["DiffusionGemmaForBlockDiffusion"]
    with pytest.raises(ModelError, match="model.config: text_config is missing"):
        plan_model(ModelConfig(config={"model_type": "diffusion_gemma"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_activation", "silu"),
        ("tie_word_embeddings", False),
        ("use_bidirectional_attention", "all"),
        ("is_encoder_decoder", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("return_dict", False),
        ("chunk_size_feed_forward", 8),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field: str, value: object, gemma_values: Values) -> None:
    places = [text(gemma_values(), **{field: value})]
    if field == "tie_word_embeddings":
        places.append({**gemma_values(), field: value})
    for values in places:
        with pytest.raises(ModelError, match=rf"^here/config.json: (text_config\.)?{field}=.*not supported") as caught:
            parse_config(values, "here/config.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "meant"),
    [("num_expert", "num_experts"), ("sliding_windw", "sliding_window"), ("canvas_lenght", "canvas_length")],
)
def test_unknown_fields_name_the_nearest(field: str, meant: str, gemma_values: Values) -> None:
    values = {**gemma_values(), field: 4} if field.startswith("canvas") else text(gemma_values(), **{field: 4})
    with pytest.raises(ModelError, match=rf"unknown DiffusionGemma field '(text_config\.)?{field}'.*{meant}"):
        parse_config(values, "config.json")


@pytest.mark.parametrize("field", ["quantization_config", "attention_k_eq_v", "audio_config", "zzz"])
def test_fields_of_other_networks_are_refused(field: str, gemma_values: Values) -> None:
    for values in ({**gemma_values(), field: {"x": 1}}, text(gemma_values(), **{field: {"x": 1}})):
        with pytest.raises(ModelError, match=rf"unknown DiffusionGemma field '(text_config\.)?{field}'"):
            parse_config(values, "config.json")


ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"vocab_size": "40"}, "vocab_size must be an integer of at least 1, got '40'"),
        ({"head_dim": 8.0}, "head_dim must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_experts": None}, "num_experts must be an integer"),
        ({"sliding_window": None}, "sliding_window must be an integer"),
        ({"num_global_key_value_heads": 0}, "num_global_key_value_heads must be an integer"),
        ({"global_head_dim": -1}, "global_head_dim must be an integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping must be a positive number"),
        ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping must be a positive number"),
        ({"initializer_range": "x"}, "initializer_range must be a positive number"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must name 3 layers"),
        ({"layer_types": ["full_attention", "linear", "full_attention"]}, "layer_types must name 3 layers, each"),
        ({"layer_types": "full_attention"}, "layer_types must name 3 layers"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types: the last layer must be full"),
        ({"num_key_value_heads": 3}, "sliding_attention: num_attention_heads=4 must be a multiple of the 3"),
        ({"num_global_key_value_heads": 8}, "full_attention: num_attention_heads=4 must be a multiple of the 8"),
        ({"head_dim": 7}, "sliding_attention: .*the head size 7 even"),
        ({"top_k_experts": 5}, "top_k_experts=5 is more than num_experts=4"),
        ({"eos_token_id": 40}, "eos_token_id=40 is outside the vocabulary of 40"),
        ({"eos_token_id": []}, r"eos_token_id=\[\] is outside"),
        ({"eos_token_id": None}, "eos_token_id=None is outside"),
        ({"pad_token_id": -1}, "pad_token_id=-1 is outside"),
        ({"rope_parameters": {**ROPE, "full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
         "rope_parameters of full_attention: 'yarn' is not supported"),
        ({"rope_parameters": {**ROPE, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
         "rope_parameters of full_attention: 'default' is not supported; .* 'proportional'"),
        ({"rope_parameters": {**ROPE, "sliding_attention": {**ROPE["sliding_attention"], "factor": 8}}},
         "rope_parameters of sliding_attention: 'factor' is not supported"),
        ({"rope_parameters": {"sliding_attention": {**ROPE["sliding_attention"], "partial_rotary_factor": 0.5}}},
         "partial_rotary_factor=0.5 of sliding_attention is not supported"),
        ({"rope_parameters": {**ROPE, "sliding_attention": {"rope_type": "default"}}}, "rope_theta must be a positive"),
        ({"rope_parameters": {**ROPE, "full_attention": {**ROPE["full_attention"], "partial_rotary_factor": 1.5}}},
         "partial_rotary_factor must be"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, "per_layer_config is not supported unless all full layers"),
        ({"per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config is not supported unless all full layers"),
        ({"per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 8}}}, "per_layer_config is not supported"),
        ({"per_layer_config": {"1": {"sliding_window": 3}, "2": {"sliding_window": 3}}},
         "per_layer_config: 'sliding_window' is not supported"),
        ({"per_layer_config": 3}, "per_layer_config must"),
        ({"per_layer_config": {"all": {"head_dim": 16}}}, "per_layer_config must"),
        ({"rope_parameters": 3}, "rope_parameters must"),
        ({"rope_parameters": {"full_attention": 1e6}}, "rope_parameters must"),
        ({"layer_types": [["full_attention"]] * 3}, "layer_types must name 3 layers"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(changes: dict, named: str, gemma_values: Values) -> None:
    with pytest.raises(ModelError, match=f"^config.json: {named}") as caught:
        parse_config(text(gemma_values(), **changes), "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("canvas", [0, -8, "8", 8.0, True])
def test_a_canvas_length_that_is_none_is_refused(canvas: object, gemma_values: Values) -> None:
    with pytest.raises(ModelError, match="^config.json: canvas_length must be an integer of at least 1"):
        parse_config({**gemma_values(), "canvas_length": canvas}, "config.json")


def test_a_text_config_of_another_kind_is_refused(gemma_values: Values) -> None:
    for value in (None, 3, []):
        with pytest.raises(ModelError, match="^config.json: text_config is missing"):
            parse_config({**gemma_values(), "text_config": value}, "config.json")
    sizes = ("num_experts", "top_k_experts", "moe_intermediate_size")
    with pytest.raises(ModelError, match="^config.json: num_experts must be an integer"):
        parse_config(without(gemma_values(), *sizes), "config.json")


def test_activation_memory_grows_with_tokens_and_shrinks_with_checkpointing(released: dict) -> None:
    config = parse_config(released, "config.json")
    whole, twice = (FAMILY.activation_bytes(config, n, 4, 2, False) for n in (1024, 2048))
    assert twice == 2 * whole and 0 < FAMILY.activation_bytes(config, 1024, 4, 2, True) < 0.2 * whole


def test_a_fill_at_which_generation_does_not_stop_is_refused(gemma_values) -> None:
    values = gemma_values()
    values["text_config"]["eos_token_id"], values["eos_token_id"] = 3, [1, 2]
    with pytest.raises(ModelError, match=r"text_config.eos_token_id=3, which fills .* none of eos_token_id=\[1, 2\]"):
        parse_config(values, "config.json")
