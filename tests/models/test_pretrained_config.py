"""Fields that transformers writes into any config.json: known, or refused all at once; generation settings are said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, GenerationConfig, PreTrainedConfig

from unmask.config.model import ModelConfig
from unmask.errors import ModelError
from unmask.models.diffusion_gemma.family import FAMILY
from unmask.models.diffusion_gemma.family import parse_config as parse_gemma
from unmask.models.llada.auto import register
from unmask.models.llada.family import parse_config as parse_llada
from unmask.models.loading import load_model
from unmask.models.pretrained_config import generation_note
from unmask.models.registry import plan_folder, plan_model


@pytest.fixture(scope="module")
def dump(fixtures: Path) -> dict[str, Any]:
    """Every field of transformers 4's PretrainedConfig with its default."""
    return json.loads((fixtures / "transformers_4_config.json").read_text())


@pytest.fixture(scope="module")
def released(fixtures: Path) -> dict[str, Any]:
    return json.loads((fixtures / "llada_8b_instruct" / "config.json").read_text())


def gemma_dump(values: dict[str, Any], dump: Mapping[str, Any]) -> dict[str, Any]:
    """A DiffusionGemma config.json whose nested configurations are dumped in full as well."""
    nested = {name: {**dump, **values[name]} for name in ("text_config", "vision_config")}
    return {**dump, **values, **nested}


def test_a_full_dump_means_what_the_file_means(dump: dict, released: dict, gemma_values: Callable[..., dict]) -> None:
    assert parse_llada({**dump, **released}, "config.json") == parse_llada(released, "config.json")
    values = gemma_values()
    assert parse_gemma(gemma_dump(values, dump), "config.json") == parse_gemma(values, "config.json")


def test_what_transformers_5_dumps_means_the_same(released: dict, gemma_values: Callable[..., dict]) -> None:
    newest = json.loads(json.dumps(PreTrainedConfig().to_dict(), default=str))
    assert parse_llada({**newest, **released}, "config.json") == parse_llada(released, "config.json")
    values = gemma_values()
    assert parse_gemma(gemma_dump(values, newest), "config.json") == parse_gemma(values, "config.json")


def test_a_dumped_folder_gives_the_same_logits_here_and_in_transformers(
    dump: dict, reference_folder: Path, tmp_path: Path
) -> None:
    """transformers 4 dumps `tie_word_embeddings: true` whatever the network does; LLaDA's own field decides."""
    folder = tmp_path / "dumped"
    shutil.copytree(reference_folder, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**dump, **values}))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    plain: Any = load_model(str(reference_folder))
    dumped: Any = load_model(str(folder))
    register()
    with torch.no_grad():
        expected = plain.logits(plain(tokens))
        assert torch.equal(dumped.logits(dumped(tokens)), expected)
        assert torch.equal(AutoModel.from_pretrained(folder)(input_ids=tokens).logits, expected)


def test_all_unknown_fields_are_named_at_once(released: dict, gemma_values: Callable[..., dict]) -> None:
    with pytest.raises(ModelError) as caught:
        parse_llada({**released, "rope_scaling": None, "quantization_config": {}, "n_head": 3}, "here/config.json")
    message = str(caught.value)
    assert message.startswith(
        "here/config.json: unknown LLaDA fields 'rope_scaling', 'quantization_config', 'n_head' (did you mean "
        "'n_heads'?); "
    )
    values = gemma_values(attention_k_eq_v=True)
    with pytest.raises(ModelError, match="fields 'audio_config'.*, 'text_config.attention_k_eq_v'") as caught:
        parse_gemma({**values, "audio_config": {}}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("is_decoder", True), ("pruned_heads", {"0": [1]}), ("chunk_size_feed_forward", 8)]
)
def test_what_asks_for_another_network_is_refused_wherever_it_stands(
    field: str, value: object, dump: dict, released: dict, gemma_values: Callable[..., dict]
) -> None:
    with pytest.raises(ModelError, match=f"config.json: {field}=.* is not supported"):
        parse_llada({**dump, **released, field: value}, "config.json")
    with pytest.raises(ModelError, match=rf"config.json: text_config\.{field}=.* is not supported"):
        parse_gemma(gemma_dump(gemma_values(**{field: value}), dump), "config.json")


def test_every_generation_parameter_of_transformers_is_known(released: dict) -> None:
    """As transformers 4 moved them between the files, any of them may stand in a config.json."""
    defaults = GenerationConfig._get_default_generation_params()
    assert parse_llada({**released, **defaults}, "config.json") == parse_llada(released, "config.json")
    assert plan_model(ModelConfig(config={**released, **defaults})).notes == ()
    assert generation_note({}, GenerationConfig().to_dict() | defaults, ()) == ""


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_generation_settings_that_are_not_used_are_said(
    file: str, dump: dict, reference_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reference_folder, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**dump, **values}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 510, "max_length": 20}))
    assert plan_folder(str(folder), "x").notes == ()
    stored = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**stored, "temperature": 0.7, "do_sample": True, "top_k": 50}))
    (note,) = plan_folder(str(folder), "x").notes
    assert note.startswith(f"not used: do_sample=True of {file}, temperature=0.7 of {file}; ") and "\n" not in note
    with pytest.warns(UserWarning, match="not used: do_sample=True"):
        load_model(str(folder))


def test_what_sampling_reads_of_a_generation_config_is_not_said(gemma_values: Callable[..., dict]) -> None:
    read = {entry.partition(".")[0] for entry in FAMILY.sampler.from_generation}
    read_here = {"max_new_tokens": 512, "t_min": 0.1, "sampler_config": {"entropy_bound": 0.2}}
    beside = {"eos_token_id": [1], "_from_model_config": True, "cache_implementation": "static", "alg_temp": None}
    assert generation_note(gemma_values(), {**read_here, **beside}, read) == ""
    assert "steps=64 of generation_config.json" in generation_note(gemma_values(), {"steps": 64}, read)
    assert "temperature=2.0 of config.json" in generation_note(gemma_values(temperature=2.0), {}, read)
