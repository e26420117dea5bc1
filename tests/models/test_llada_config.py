"""config.json: every field is honoured, known to be harmless, or refused by name with the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unmask.errors import ModelError
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.family import FAMILY, parse_config
from unmask.models.loading import empty_network

SMALL = {
    "model_type": "llada",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "vocab_size": 512,
    "mask_token_id": 511,
    "eos_token_id": 510,
    "pad_token_id": 510,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_type", "swiglu"),
        ("activation_type", "gelu"),
        ("alibi", True),
        ("attention_dropout", 0.1),
        ("attention_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("block_group_size", 4),
        ("block_type", "sequential"),
        ("embedding_dropout", 0.1),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("residual_dropout", 0.1),
        ("rope", False),
        ("rope_full_precision", False),
        ("is_decoder", True),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("chunk_size_feed_forward", 8),
        ("pruned_heads", {"0": [1]}),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("return_dict", False),
        ("init_fn", "kaiming_normal"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"^here/config.json: {field}=.*not supported") as caught:
        parse_config(SMALL | {field: value}, "here/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("n_kv_head", "n_kv_heads"),
        ("rope_theat", "rope_theta"),
        ("weight_tieing", "weight_tying"),
        ("residual_dropuot", "residual_dropout"),
        ("transformers_versoin", "transformers_version"),
    ],
)
def test_unknown_fields_name_the_nearest(field: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"unknown LLaDA field '{field}'.*{meant}"):
        parse_config(SMALL | {field: 1}, "config.json")


@pytest.mark.parametrize("field", ["quantization_config", "rope_scaling", "sliding_window", "zzz"])
def test_fields_of_other_networks_are_refused(field: str) -> None:
    with pytest.raises(ModelError, match=f"unknown LLaDA field '{field}'"):
        parse_config(SMALL | {field: {"x": 1}}, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", "64"),
        ("d_model", 64.0),
        ("d_model", None),
        ("n_layers", True),
        ("weight_tying", 1),
        ("weight_tying", "false"),
        ("rope_theta", "500000"),
        ("init_fn", 3),
        ("mask_token_id", None),
        ("n_kv_heads", [4]),
    ],
)
def test_values_of_another_type_are_refused(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"config.json: {field} should be .*got"):
        parse_config(SMALL | {field: value}, "config.json")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_kv_heads": 0}, "kv_heads must be at least 1"),
        ({"mlp_hidden_size": 0}, "hidden_size must be at least 1"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
        ({"n_heads": 5}, "d_model=64 must split into n_heads=5"),
        ({"d_model": 12}, "d_model=12 must split into n_heads=4 heads of even size"),
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"embedding_size": 500}, "embedding_size=500 is below vocab_size=512"),
        ({"mask_token_id": 512}, "mask_token_id=512 is outside the vocabulary of 512"),
        ({"mask_token_id": -1}, "mask_token_id=-1 is outside"),
        ({"eos_token_id": 512}, "eos_token_id=512 is outside"),
        ({"pad_token_id": 9999}, "pad_token_id=9999 is outside"),
        ({"mask_token_id": 510, "pad_token_id": 509}, "mask_token_id=510 is also the eos_token_id"),
        ({"mask_token_id": 509, "pad_token_id": 509}, "mask_token_id=509 is also the pad_token_id"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"init_std": float("nan")}, "init_std must be a positive number"),
        ({"multi_query_attention": True, "n_kv_heads": 4}, "multi_query_attention=True contradicts n_kv_heads=4"),
        ({"multi_query_attention": False, "n_kv_heads": 2}, "multi_query_attention=False contradicts n_kv_heads=2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True contradicts weight_tying=False"),
        ({"tie_word_embeddings": False, "weight_tying": True}, "tie_word_embeddings=False contradicts"),
        ({"include_bias": True}, "include_bias=True .* add bias_for_layer_norm=False"),
        ({"include_bias": True, "bias_for_layer_norm": None}, "include_bias=True .* add bias_for_layer_norm=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_sizes_that_do_not_fit_are_refused(fields: dict, named: str) -> None:
    with pytest.raises(ModelError, match=f"^config.json: {named}"):
        parse_config(SMALL | fields, "config.json")


def test_ids_in_padded_rows_are_allowed() -> None:
    config = parse_config(SMALL | {"embedding_size": 520, "mask_token_id": 519}, "config.json")
    assert (config.mask_token_id, config.rows) == (519, 520)


def test_none_takes_the_derived_size() -> None:
    config = parse_config(SMALL | {"multi_query_attention": True}, "config.json")
    assert (config.kv_heads, config.hidden_size, config.rows, config.head_dim) == (1, 256, 512, 16)
    config = parse_config(SMALL | {"n_kv_heads": 2, "mlp_ratio": 3, "mlp_hidden_size": None}, "config.json")
    assert (config.kv_heads, config.hidden_size) == (2, 192)
    config = parse_config(SMALL | {"include_bias": True, "bias_for_layer_norm": False}, "config.json")
    assert config.include_bias


def test_the_released_configuration_is_the_default_and_counts_eight_billion(fixtures: Path) -> None:
    values = json.loads((fixtures / "llada_8b_instruct" / "config.json").read_text())
    config = parse_config(values, "config.json")
    filled = {"n_kv_heads": 32, "embedding_size": 126464, "mlp_hidden_size": 12288}
    assert config == LLaDAConfig(**filled)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = empty_network(FAMILY, config)
    attention = 4 * 4096 * 4096
    mlp = 3 * 4096 * 12288
    norms = 2 * 4096
    by_hand = 2 * 126464 * 4096 + 32 * (attention + mlp + norms) + 4096
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 8_015_581_184
    names = set(model.state_dict())
    assert len(names) == 3 + 32 * 9
    assert {"model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"} <= names
    assert "model.transformer.blocks.31.ff_out.weight" in names and not any(name.endswith("bias") for name in names)
