"""Safetensors folders: what goes in comes out, and every damage is named."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.config.model import ModelConfig
from unmask.errors import ModelError
from unmask.models import weights
from unmask.models.folders import stored_tensors
from unmask.models.loading import build_model, empty_network, load_model
from unmask.models.registry import plan_folder, plan_model
from unmask.models.weights import check_tensors, fill, load_weights, read_tensors, save_weights, whole_piece

QUERY = "model.transformer.blocks.1.q_proj.weight"


@pytest.fixture
def state(reference_folder: Path) -> dict[str, Tensor]:
    return load_file(reference_folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, reference_folder: Path) -> Path:
    """A folder with the reference checkpoint's config.json and no weights yet."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    shutil.copy(reference_folder / "config.json", path)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return sorted(left) == sorted(right) and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def files_of(folder: Path) -> set[Path]:
    return {chunk.file for stored in stored_tensors(folder).values() for chunk in stored.chunks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 200_000, 1])
def test_round_trip(dtype: torch.dtype, shard_bytes: int, state: dict[str, Tensor], folder: Path) -> None:
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    written = save_weights(state.items(), folder, shard_bytes)
    assert {path.name for path in written} == {path.name for path in folder.iterdir()} - {"config.json"}
    shards = [path for path in written if path.suffix == ".safetensors"]
    assert len(shards) == {10**9: 1, 1: len(state)}.get(shard_bytes, len(shards))
    assert (len(shards) > 1) == (shard_bytes < 10**9)
    assert all(path.stat().st_size < shard_bytes + 10_000 for path in shards) or shard_bytes == 1
    assert same(dict(read_tensors(folder)), state)
    model = load_model(str(folder))
    assert same(model.state_dict(), state)
    assert list(model.state_dict()) == list(build_model(plan_folder(str(folder), "x"), None).state_dict())


def test_an_index_says_what_transformers_expects(state: dict[str, Tensor], folder: Path) -> None:
    save_weights(state.items(), folder, 200_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in state.values())
    count = len(set(index["weight_map"].values()))
    names = {f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    assert set(index["weight_map"].values()) == names
    for key, name in index["weight_map"].items():
        assert key in load_file(folder / name)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_dtype_asked_or_stored(stored: torch.dtype, asked: str | None, state: dict, folder: Path) -> None:
    save_weights(((key, tensor.to(stored)) for key, tensor in state.items()), folder)
    model = load_model(str(folder), asked)
    expected = stored if asked is None else getattr(torch, asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert not model.training
    assert torch.equal(model.state_dict()[QUERY], state[QUERY].to(stored).to(expected))


def test_device_and_dtype_are_checked(state: dict[str, Tensor], folder: Path) -> None:
    save_weights(state.items(), folder)
    assert {parameter.device.type for parameter in load_model(str(folder), device="meta").parameters()} == {"meta"}
    with pytest.raises(ModelError, match="dtype 'bf16' is not one of .*bfloat16"):
        load_model(str(folder), "bf16")


def test_load_leaves_no_part_of_the_file_mapped(state: dict[str, Tensor], folder: Path) -> None:
    save_weights(state.items(), folder)
    model = load_model(str(folder))
    before = model.state_dict()[QUERY].clone()
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place: a mapped tensor would change
    assert torch.equal(model.state_dict()[QUERY], before)


def test_load_never_holds_two_copies(state: dict[str, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(state.items(), folder)
    alive: list[int] = []
    live: set[str] = set()

    original = weights._read

    def watched(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in original(*arguments):
            live.add(key)
            weakref.finalize(tensor, live.discard, key)
            alive.append(len(live))
            yield key, tensor
            del tensor

    monkeypatch.setattr(weights, "_read", watched)
    model = build_model(plan_folder(str(folder), "x"), "bfloat16")
    # One being copied, and the one before it while the generators hand over.
    assert len(alive) == len(state) and max(alive) <= 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_filling_keeps_the_parameters_that_an_optimizer_holds(
    state: dict, folder: Path, reference_folder: Path
) -> None:
    save_weights(((key, tensor + 1) for key, tensor in state.items()), folder)
    model = load_model(str(reference_folder))
    held = dict(model.named_parameters())
    fill(((key, whole_piece(tensor)) for key, tensor in model.state_dict().items()), folder)
    assert all(held[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(held[QUERY], state[QUERY] + 1)


def test_tensors_missing_extra_or_misshapen_are_named(
    state: dict[str, Tensor], folder: Path, reference_folder: Path
) -> None:
    """By loading, and from the headers alone."""
    model = load_model(str(reference_folder))
    check_tensors(model, reference_folder)
    damaged = {
        "missing (1 in all)": {key: tensor for key, tensor in state.items() if key != QUERY},
        "no place": state | {"model.transformer.blocks.7.q_proj.weight": state[QUERY].clone()},
        "(64, 32), config.json says (64, 64)": state | {QUERY: state[QUERY][:, :32].contiguous()},
    }
    for problem, tensors in damaged.items():
        save_weights(tensors.items(), folder)
        with pytest.raises(ModelError) as caught:
            load_model(str(folder))
        message = str(caught.value)
        with pytest.raises(ModelError) as from_headers:
            check_tensors(model, folder)
        assert str(from_headers.value) == message
        assert problem in message and str(folder) in message and "\n" not in message
        assert (QUERY if "place" not in problem else "blocks.7") in message


def test_a_missing_file_of_the_last_rank_is_suspected(state: dict[str, Tensor], folder: Path) -> None:
    (folder / "sharded").mkdir()
    info = json.dumps({key: {"saved_offsets": [0] * tensor.dim()} for key, tensor in state.items()})
    first = {key: tensor[: len(tensor) // 2].contiguous() for key, tensor in state.items()}
    save_file(first, folder / "sharded" / "shard-1.safetensors", {"DCP_SHARDING_INFO": info})
    with pytest.raises(
        ModelError, match=r"has shape .*, config.json says .*; is the file of a rank missing in sharded/"
    ):
        load_model(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, 0.999])
def test_a_file_cut_short_is_named_before_torch_loads_it(keep: float, state: dict[str, Tensor], folder: Path) -> None:
    save_weights(state.items(), folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 or keep == 0 else keep * len(whole))])
    with pytest.raises(ModelError, match="not a whole safetensors file") as caught:
        plan_folder(str(folder), "checkpoint")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_damaged_shards_and_indexes_are_named(state: dict[str, Tensor], folder: Path) -> None:
    index = folder / "model.safetensors.index.json"

    def check(problem: str, damage) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        save_weights(state.items(), folder, 200_000)
        values = json.loads(index.read_text())
        damage(values)
        with pytest.raises(ModelError, match=problem) as caught:
            plan_folder(str(folder), "checkpoint")
        assert "\n" not in str(caught.value)

    shards = [path.name for path in save_weights(state.items(), folder, 200_000)[:-1]]
    shard = shards[1]

    def rewrite(values: dict, **changes: str | None) -> None:
        for key, file in changes.items():
            values["weight_map"].pop(key) if file is None else values["weight_map"].update({key: file})
        index.write_text(json.dumps(values))

    def cut(_: dict) -> None:
        path = folder / shard
        path.write_bytes(path.read_bytes()[:-1])

    def smaller_shard(values: dict) -> None:
        tensors = load_file(folder / shard)
        tensors.popitem()
        save_file(tensors, folder / shard)

    check(f"{shard}: this shard is missing", lambda _: (folder / shard).unlink())
    check(f"{shard}: not a whole safetensors file", cut)
    check("disagrees with its shards", smaller_shard)
    check(f"disagrees with its shards about '{QUERY}'", lambda values: rewrite(values, **{QUERY: None}))
    check("disagrees with its shards about 'extra'", lambda values: rewrite(values, extra=shard))
    check(
        f"disagrees with its shards about '{QUERY}'",
        lambda values: rewrite(values, **{QUERY: next(name for name in shards if name != values["weight_map"][QUERY])}),
    )
    check("no weight_map", lambda _: index.write_text("{}"))
    check("not valid JSON", lambda _: index.write_text('{"weight_map": {'))


def test_a_single_file_wins_over_an_index_as_in_transformers(state: dict[str, Tensor], folder: Path) -> None:
    save_weights(state.items(), folder, 200_000)
    save_weights(state.items(), folder)
    assert files_of(folder) == {folder / "model.safetensors"}


def test_a_failed_save_leaves_nothing_behind(state: dict[str, Tensor], folder: Path) -> None:
    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(state.items())[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_weights(interrupted(), folder, 50_000)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_fresh_network_is_a_function_of_the_seed(reference_folder: Path) -> None:
    section = ModelConfig(config=json.loads((reference_folder / "config.json").read_text()))
    plan = plan_model(section)
    assert plan.folder is None and plan.config_json["architectures"] == ["LLaDAModelLM"]
    models = [build_model(plan, "float32", seed=seed).state_dict() for seed in (1, 1, 2)]
    assert same(models[0], models[1]) and not torch.equal(models[0][QUERY], models[2][QUERY])
    by_path = plan_model(ModelConfig(config=str(reference_folder / "config.json")))
    by_folder = plan_model(ModelConfig(config=str(reference_folder)))
    assert by_path == by_folder and by_path.config == plan.config and by_path.folder is None


def test_load_weights_gives_trainable_parameters(state: dict[str, Tensor], folder: Path) -> None:
    save_weights(state.items(), folder)
    plan = plan_folder(str(folder), "x")
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config)
    load_weights(model, folder, torch.float32, "cpu")
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


def test_files_have_the_permissions_that_other_files_get(state: dict[str, Tensor], folder: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(state.items(), folder, 200_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.glob("model*")} == {0o640}


@pytest.mark.parametrize("hub_id", [None, "owner/model"])
def test_an_auto_map_names_code_that_can_be_found(
    state: dict[str, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch, hub_id: str | None
) -> None:
    """Remote code is never written, so an entry without a repository would name a file that is not there."""
    from unmask.models import folders

    save_weights(state.items(), folder)
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "other/place--modeling.Model",
        "AutoTokenizer": ["slow.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(folders, "_download", lambda name, where, patterns: folder)
    written = plan_folder(hub_id or str(folder), "x", weights=False).config_json
    ours = {
        "AutoConfig": "owner/model--configuration_llada.LLaDAConfig",
        "AutoTokenizer": ["owner/model--slow.Tokenizer", None],
    }
    assert written["auto_map"] == {"AutoModel": "other/place--modeling.Model", **(ours if hub_id else {})}
    assert {**written, "auto_map": None} == {**values, "auto_map": None}
    values["auto_map"].pop("AutoModel")
    fresh = plan_model(ModelConfig(config=values))
    assert "auto_map" not in fresh.config_json
