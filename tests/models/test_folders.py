"""From a name to a folder: what is local stays local, and every miss says what to give instead."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from unmask.config.model import ModelConfig
from unmask.config.reader import read_section
from unmask.errors import ConfigError, ModelError
from unmask.models import folders
from unmask.models.folders import find_folder, stored_tensors, weights_fingerprint
from unmask.models.llada.config import LLaDAConfig
from unmask.models.loading import load_model
from unmask.models.registry import FAMILIES, ModelPlan, family_named, family_of, plan_folder, plan_model, resolve
from unmask.models.tokenizer import find_tokenizer, load_tokenizer
from unmask.sampling.plan import JobPlan


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, where: str, patterns: list[str]) -> Path:
        raise AssertionError(f"{name} was sent to the hub")

    monkeypatch.setattr(folders, "_download", refuse)


def refused(name: str | Path, where: str = "checkpoint") -> str:
    with pytest.raises(ModelError) as caught:
        plan_folder(str(name), where)
    message = str(caught.value)
    assert "\n" not in message and str(name).removeprefix("~/").removeprefix("./") in message
    return message


def test_a_folder_and_a_run_directory(tmp_path: Path, reference_folder: Path) -> None:
    assert find_folder(str(reference_folder)) == reference_folder
    run = tmp_path / "run"
    shutil.copytree(reference_folder, run / "step_10")
    (run / "latest").symlink_to("step_10")
    assert find_folder(str(run)) == run / "latest"
    message = refused(tmp_path, "--checkpoint")
    assert message == f"--checkpoint: {tmp_path} is not a checkpoint: it has no config.json; did you mean {run}?"
    assert plan_folder(str(run), "x").config == plan_folder(str(reference_folder), "x").config


def test_relative_and_home_paths(tmp_path: Path, reference_folder: Path, monkeypatch, no_hub) -> None:
    shutil.copytree(reference_folder, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("models/tiny").samefile(tmp_path / "models" / "tiny")
    assert find_folder("~/models/tiny") == tmp_path / "models" / "tiny"


def test_what_is_missing_locally_is_never_sent_to_the_hub(tmp_path: Path, monkeypatch, no_hub) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    # models/tiny could be a hub id, but a folder models lies here.
    for name in ("/nowhere/model", "./model", "../model", "~/no-such-model", "model", "a/b/c", "models/tiny"):
        assert "no such folder" in refused(name)


def test_a_hub_id_without_a_network_says_so_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused("GSAI-ML/no-such-model", "model.pretrained_model_name_or_path")
    assert message.startswith("model.pretrained_model_name_or_path: GSAI-ML/no-such-model is neither a local folder")
    assert "network" in message


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, reference_folder: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    shutil.copy(reference_folder / "config.json", tmp_path)
    assert "not a checkpoint: neither model.safetensors" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llada", "d_mo')
    assert "not valid JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    assert "not valid JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "expected a JSON object" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model_type None is not one of llada" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lladda"}')
    assert "did you mean 'llada'?" in refused(tmp_path)
    for values, said in (
        ({"architectures": 5}, "architectures must be a list of names, got 5"),
        ({"architectures": "LLaDAModelLM"}, "architectures must be a list of names, got 'LLaDAModelLM'"),
        ({"architectures": [["x"]]}, "architectures must be a list of names, got [['x']]"),
        ({"model_type": ["x"]}, "model_type must be text, got ['x']"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada"} | values))
        assert refused(tmp_path) == f"{tmp_path / 'config.json'}: {said}"


def test_a_file_is_no_folder(reference_folder: Path) -> None:
    assert "is a file; give the folder" in refused(reference_folder / "model.safetensors")
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(reference_folder / "config.json"))


def test_a_checkpoint_without_a_tokenizer(reference_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dataset.tokenizer: .*has no tokenizer"):
        load_tokenizer(str(reference_folder), "dataset.tokenizer")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "tru')
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_model_section_takes_one_source(tmp_path: Path) -> None:
    for values in ({}, {"pretrained_model_name_or_path": "x", "config": {}}):
        with pytest.raises(ConfigError, match="model.pretrained_model_name_or_path: set either this .* and not both"):
            read_section(ModelConfig, values, "model")
    with pytest.raises(ModelError, match="model.config: model_type None is not one of"):
        plan_model(ModelConfig(config={}))
    with pytest.raises(ModelError, match="none.json: cannot be read"):
        plan_model(ModelConfig(config=str(tmp_path / "none.json")))


ALL, APART = {"reference", "balanced", "fast"}, {"balanced", "fast"}  # APART: without the published sampler
PRESETS = {"llada": ALL, "diffusion_gemma": ALL, "Dream": APART, "a2d-llama": APART, "a2d-qwen2": APART,
           "a2d-qwen3": APART}  # fmt: skip


def test_every_family_of_the_table_says_its_own_name() -> None:
    for model_type, target in FAMILIES.items():
        family = resolve(target)
        assert family.model_type == model_type and set(family.sampler.presets) == PRESETS[model_type]
        assert family_named({"model_type": model_type, "architectures": [family.architectures[0]]}, "x") is family


def test_a_family_is_found_by_its_architecture_where_two_share_a_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaDA-MoE's released config.json says `llada` too."""
    values = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}
    with pytest.raises(ModelError, match=r"config.json: architectures \['LLaDAMoEModelLM'\] is not .* LLaDAModelLM"):
        family_named(values, "config.json")
    llada = family_named({"model_type": "llada"}, "x")
    moe_config = type("MoEConfig", (LLaDAConfig,), {"family": "LLaDAMoEModelLM"})()
    moe = dataclasses.replace(llada, architectures=("LLaDAMoEModelLM",), parse_config=lambda values, where: moe_config)
    other = SimpleNamespace(FAMILY=moe)
    monkeypatch.setitem(sys.modules, "moe_family", other)  # type: ignore[arg-type]
    monkeypatch.setitem(FAMILIES, "LLaDAMoEModelLM", "moe_family:FAMILY")
    assert family_named(values, "x") is moe and family_of(moe.parse_config(values, "x")) is moe
    assert family_named({"model_type": "llada", "architectures": ["LLaDAModelLM"]}, "x") is llada
    assert family_of(llada.parse_config({"model_type": "llada"}, "x")) is llada


REPOSITORY = [
    ".gitattributes", "README.md", "config.json", "configuration_llada.py", "generation_config.json", "merges.txt",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    "modeling_llada.py", "pytorch_model.bin", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
LIGHT = {
    "config.json", "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, reference_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """A hub whose one model has a tokenizer; what each download asks of REPOSITORY is appended to the list."""
    import huggingface_hub

    asked: list[set[str]] = []
    snapshot = tmp_path / "snapshot"
    shutil.copytree(reference_folder, snapshot)
    (snapshot / "tokenizer.json").write_text("{}")

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append({file for file in REPOSITORY if any(fnmatch(file, pattern) for pattern in allow_patterns)})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_tokenizer_is_fetched_without_the_model(hub: list[set[str]], tmp_path: Path) -> None:
    assert find_tokenizer("owner/model") == tmp_path / "snapshot"
    assert hub == [LIGHT]


def test_a_plan_to_look_at_fetches_no_weights(hub: list[set[str]], tmp_path: Path) -> None:
    section = ModelConfig(pretrained_model_name_or_path="owner/model")
    whole = plan_model(section)
    for path in (tmp_path / "snapshot").glob("model*"):
        path.unlink()
    light = plan_model(section, weights=False)
    weights = {file for file in REPOSITORY if file.startswith("model") and not file.endswith(".py")}
    assert hub == [LIGHT | weights, LIGHT]
    assert light == whole and light.source == "owner/model"
    with pytest.raises(ModelError, match="not a checkpoint: neither model.safetensors"):
        plan_model(section)


def test_local_weights_are_checked_even_where_they_are_not_needed(tmp_path: Path, reference_folder: Path) -> None:
    shutil.copytree(reference_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        plan_folder(str(tmp_path / "model"), "x", weights=False)


@pytest.mark.parametrize(("base", "named"), [("owner/base", "owner/base"), ("", "BASE"), (None, "BASE")])
def test_an_adapter_is_no_checkpoint(tmp_path: Path, base: str | None, named: str) -> None:
    folder = tmp_path / "run" / "step_3"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest").symlink_to("step_3")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "tokenizer.json").touch()
    for place in (folder, tmp_path / "run"):
        said = refused(place, "--checkpoint")
        assert "is an adapter" in said and f"`--checkpoint {named} --adapter {place}`" in said
        assert find_tokenizer(str(place)).samefile(folder)


def test_a_change_of_any_tensor_changes_the_fingerprint_and_the_place_does_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {f"layer.{n}": rng.normal(size=(64, 512)).astype(np.float32) for n in range(5)}
    weights["norm"] = np.ones(8, dtype=np.float32)
    (tmp_path / "one").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    (tmp_path / "one" / "config.json").write_text("{}")
    whole = weights_fingerprint(shutil.copytree(tmp_path / "one", tmp_path / "two"))
    assert whole == weights_fingerprint(tmp_path / "one")
    for name in weights:
        changed = {**weights, name: weights[name] * np.float32(1.01)}
        save_file(changed, tmp_path / "two" / "model.safetensors", {"format": "pt"})
        assert weights_fingerprint(tmp_path / "two") != whole, name
    save_file(weights, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(tmp_path / "two") == whole
    (tmp_path / "two" / "config.json").write_text('{"rope_theta": 1}')
    assert weights_fingerprint(tmp_path / "two") != whole


def save_parts(folder: Path, weights: dict[str, np.ndarray], rows: list[tuple[int, int]]) -> None:
    """Write each rank's rows of every tensor as a sharded run does."""
    shutil.rmtree(folder / "sharded", ignore_errors=True)
    (folder / "sharded").mkdir()
    for rank, (begin, end) in enumerate(rows):
        offsets = {name: {"saved_offsets": [begin] + [0] * (whole.ndim - 1)} for name, whole in weights.items()}
        part = {name: np.ascontiguousarray(whole[begin:end]) for name, whole in weights.items()}
        save_file(part, folder / "sharded" / f"shard-{rank}.safetensors", {"DCP_SHARDING_INFO": json.dumps(offsets)})


def test_shards_of_ranks_are_sampled_throughout(tmp_path: Path) -> None:
    weights = {f"layer.{n}": np.zeros((64, 512), dtype=np.float32) for n in range(4)}
    rows = [(0, 32), (32, 64)]
    save_parts(tmp_path, weights, rows)
    whole = weights_fingerprint(tmp_path)
    for name in weights:
        for begin, end in rows:
            changed = weights[name].copy()
            changed[begin:end] = 1
            save_parts(tmp_path, {**weights, name: changed}, rows)
            assert weights_fingerprint(tmp_path) != whole, (name, begin)
    save_parts(tmp_path, weights, rows)
    assert weights_fingerprint(tmp_path) == whole


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 2), (2, 4), (2, 4), (6, 8)],  # a file copied over another
        [(0, 4), (2, 4), (6, 8)],
        [(0, 2), (2, 4), (6, 8)],
        [(0, 2), (2, 4), (4, 8), (6, 8)],
    ],
)
def test_parts_that_leave_a_hole_or_overlap_are_refused(tmp_path: Path, rows: list[tuple[int, int]]) -> None:
    weights = {"norm": np.ones(8, dtype=np.float32), "layer": np.ones((8, 4), dtype=np.float32)}
    save_parts(tmp_path, weights, [(0, 2), (2, 2), (2, 5), (5, 8)])
    assert {name: stored.shape for name, stored in stored_tensors(tmp_path).items()} == {"norm": (8,), "layer": (8, 4)}
    save_parts(tmp_path, weights, rows)
    with pytest.raises(ModelError, match=r"the parts of '\w+' do not make a whole: a rank's file is missing") as caught:
        stored_tensors(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tiles_of_two_dimensions_make_a_whole_unless_they_overlap(tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()

    def stored(*offsets: tuple[int, int]) -> tuple[int, ...]:
        for number, offset in enumerate(offsets):
            info = json.dumps({"a": {"saved_offsets": offset}})
            part = {"a": np.ones((2, 2), dtype=np.float32)}
            save_file(part, tmp_path / "sharded" / f"{number}.safetensors", {"DCP_SHARDING_INFO": info})
        return stored_tensors(tmp_path)["a"].shape

    assert stored((0, 0), (0, 2), (2, 0), (2, 2)) == (4, 4)
    with pytest.raises(ModelError, match="do not make a whole"):
        stored((0, 0), (1, 0), (0, 2), (2, 2))


def test_the_same_adapter_of_another_scale_is_another_model(tmp_path: Path) -> None:
    save_file({"a": np.ones(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    found, none = [], cast(Any, None)
    for alpha in (8, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.append(JobPlan("", ModelPlan(none, none, {}, tmp_path), tmp_path, {}, none, tmp_path).fingerprint())
    assert found[0]["weights"] == found[1]["weights"] and found[0]["adapter"] != found[1]["adapter"]


@pytest.mark.parametrize("text", ['{"n_heads": 4, "n_heads": 2}', '{"a": {"n_heads": 4, "n_heads": 4}}'])
def test_a_key_given_twice_in_a_checkpoints_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="config.json: the key 'n_heads' is given twice in one object"):
        folders.read_json(tmp_path / "config.json")


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ModelError, match="config.json: not valid JSON"):
        folders.read_json(tmp_path / "config.json")
