"""What a config.json on the decoder trunk may say, and each thing that is refused, in one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import unmask
from unmask.cli import main
from unmask.errors import ModelError
from unmask.models.decoder.config import DecoderConfig
from unmask.models.registry import family_named

DREAM_7B = {  # Dream-org/Dream-v0-Instruct-7B
    "architectures": ["DreamModel"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "mask_token_id": 151666, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "Dream",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "pad_token_id": 151643,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3 = {**DREAM_7B, "model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "attention": "bidirectional"}


def parsed(values: dict, **fields: object) -> DecoderConfig:
    values = {**values, **fields}
    return family_named(values, "config.json").parse_config(values, "config.json")


def test_the_released_sizes_are_read() -> None:
    config = parsed(DREAM_7B)
    assert (config.head_dim, config.kv_heads, config.rows, config.max_sequence_length) == (128, 4, 152064, 131072)
    assert config.qkv_bias and not config.output_bias and not config.qk_norm and config.shift == 1
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (151666, 151643, 151643)
    assert len(config.inverse_frequencies) == 64 and config.inverse_frequencies[0] == 1.0
    assert config.inverse_frequencies[32] == pytest.approx(1e-3) and config.rotary_scale == 1.0


def test_what_a_type_says_and_a_file_does_not() -> None:
    qwen3 = parsed(QWEN3)
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128 and qwen3.shift == 0
    assert parsed(QWEN3, num_attention_heads=16).head_dim == 128  # transformers' default, whatever the heads
    llama = parsed(QWEN3, model_type="a2d-llama", architectures=["A2DLlamaLMHeadModel"], attention_bias=True)
    assert llama.qkv_bias and llama.output_bias and not llama.qk_norm
    several = parsed(QWEN3, eos_token_id=[151645, 151643], pad_token_id=None)
    assert (several.eos_token_id, several.eos_token_ids, several.pad_token_id) == (151645, (151645, 151643), 151645)
    assert parsed(QWEN3, num_key_value_heads=None).kv_heads == 28


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, this network implements hidden_act='silu' only"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be .* a window are not supported"),
        ({"attention_bias": True}, "unknown Dream field 'attention_bias'"),
        ({"attention": "causal"}, "unknown Dream field 'attention'"),
        ({"vision_config": {}}, "unknown Dream field 'vision_config'"),
        ({"num_key_value_headz": 4}, "unknown Dream field 'num_key_value_headz'.*num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size: missing; Dream's config.json says each"),
        ({"hidden_size": "3584"}, "hidden_size should be int, got '3584'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_attention_heads": True}, "num_attention_heads should be int, got True"),
        ({"num_key_value_heads": 3}, "num_attention_heads=28 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 63}, "heads must have an even size, got head_dim=63"),
        ({"hidden_size": 3600}, "heads must have an even size, got head_dim=128 .hidden_size=3600"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most 10,000"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ({"initializer_range": float("nan")}, "initializer_range must be a positive number, got nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings should be bool, got 'yes'"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ({"rope_scaling": [1]}, "rope_scaling should be a mapping"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type 'dynamic' is not one of default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2}}, r"rope_type \['yarn'\] is not one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE of rope_type 'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive number, got '2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta": 3}}, "'yarn' has no field 'beta'"),
        ({"rope_scaling": {"mrope_section": [1]}}, "'default' has no field 'mrope_section'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'default' has no field 'partial_rotary_factor'"),
        ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn' cannot be computed"),
        ({"mask_token_id": None}, "mask_token_id is missing; add the id that the tokenizer has for it"),
        ({"mask_token_id": 152064}, "mask_token_id=152064 is outside the vocabulary of 152064"),
        ({"mask_token_id": 151643}, "mask_token_id=151643 is also the eos_token_id"),
        ({"pad_token_id": 151666}, "mask_token_id=151666 is also the pad_token_id"),
        ({"eos_token_id": []}, "eos_token_id is missing"),
        ({"eos_token_id": [151643, "x"]}, "eos_token_id should be int, got 'x'"),
    ],
    ids=str,
)
def test_what_the_network_does_not_compute_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ModelError, match=f"^config.json: .*{message}") as caught:
        parsed(DREAM_7B, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (None, 'released files do not say which; for an mdlm model add "attention": "bidirectional" to config.json'),
        ("block_causal", "attention='block_causal' is not supported yet, 'bidirectional' is"),
        ("causal", "attention 'causal' is not one of bidirectional"),
    ],
)
def test_a_file_that_does_not_say_which_attention_must(attention: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parsed(QWEN3, attention=attention)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen2", "model_type 'qwen2' is an autoregressive model, which was not trained to fill in masked tokens"),
        ("qwen3", "is an autoregressive model"),
        ("llama", "is an autoregressive model"),
        ("mistral", "is an autoregressive model"),
        ("sdar", "is a diffusion model with block-causal attention, which is not supported yet"),
        ("Fast_dLLM_Qwen", "is a diffusion model with block-causal attention, which is not supported yet"),
        ("a2d-qwen", "model_type 'a2d-qwen' is not one of .*did you mean 'a2d-qwen3'"),
    ],
)
def test_models_of_another_kind_are_refused_by_every_command(
    model_type: str, message: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**DREAM_7B, "model_type": model_type}))
    with pytest.raises(ModelError, match=message):
        unmask.load_model(str(tmp_path / "model"))
    source = {"pretrained_model_name_or_path": str(tmp_path / "model")}
    run = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", model=source))
    for words in (
        ["generate", "--checkpoint", str(tmp_path / "model"), "--prompt", "x"],
        ["train", "-c", str(run)],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "model_type" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_architectures_of_another_class_are_refused() -> None:
    with pytest.raises(ModelError, match=r"architectures \['Qwen2ForCausalLM'\] is not supported; Dream is DreamModel"):
        parsed(DREAM_7B, architectures=["Qwen2ForCausalLM"])
