"""The released file layout in and out: the same keys and bytes, complete for transformers, and every misfit named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.config.model import ModelConfig
from unmask.errors import ModelError
from unmask.models.diffusion_gemma.family import FAMILY, parse_config
from unmask.models.diffusion_gemma.model import DiffusionGemma
from unmask.models.folders import stored_tensors
from unmask.models.loading import build_model, empty_network, load_model, save_model
from unmask.models.registry import plan_folder, plan_model
from unmask.models.weights import fill, passthrough_tensors, read_slices, read_tensors, save_weights, whole_piece
from unmask.training.export import export, layer_gaps

VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
STACK, ENCODER = "model.decoder.", "model.encoder.language_model."


@pytest.fixture(scope="module")
def checkpoint(gemma_reference: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint as transformers writes it."""
    folder = tmp_path_factory.mktemp("reference")
    gemma_reference().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return dict(read_tensors(folder))


def assert_same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and tensor.shape == other[key].shape, key
        assert torch.equal(tensor.view(torch.uint8), other[key].view(torch.uint8)), key


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a single-file checkpoint with its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference_of(folder: Path, dtype: str = "auto") -> Any:
    """transformers' model of a folder, which must have every tensor and no other."""
    from transformers import DiffusionGemmaForBlockDiffusion

    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    tokens, canvas = torch.arange(3, 12)[None], torch.arange(20, 28)[None]
    if isinstance(model, DiffusionGemma):
        return model.logits(model.decode(canvas, model.encode(tokens)))
    return model(input_ids=tokens, decoder_input_ids=canvas).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_what_transformers_wrote_comes_out_again(dtype: torch.dtype, shards: str, gemma_reference, tmp_path) -> None:
    theirs = gemma_reference(seed=3).to(dtype)
    theirs.save_pretrained(tmp_path / "in", max_shard_size=shards)
    assert (len({entry.chunks[0].file for entry in stored_tensors(tmp_path / "in").values()}) > 3) == (shards == "20KB")
    assert export(str(tmp_path / "in"), tmp_path / "out") == [
        f"{tmp_path / 'in'} has no tokenizer, so the exported folder has none either"
    ]
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert_same_bytes(before, after)
    assert sum(key.startswith(VISION) for key in after) == 16
    # Each role has its own layer scalars, all of them different here.
    scalars = {key: float(value) for key, value in after.items() if key.endswith("layer_scalar")}
    assert len(set(scalars.values())) == len(scalars) == 6
    ours = load_model(str(tmp_path / "out"))
    assert isinstance(ours, DiffusionGemma) and {p.dtype for p in ours.parameters()} == {dtype}
    model = reference_of(tmp_path / "out")
    assert model.dtype == dtype
    assert torch.equal(logits_of(model), logits_of(reference_of(tmp_path / "in")))
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(ours), logits_of(theirs), atol=2e-5, rtol=2e-4)


def test_large_checkpoints_come_out_in_shards(checkpoint: Path, gemma_reference, tmp_path: Path) -> None:
    plan = plan_folder(str(checkpoint), "checkpoint")
    model = build_model(plan, None)
    tensors = chain(model.state_dict().items(), passthrough_tensors(plan.folder, FAMILY.files))
    written = save_weights(tensors, tmp_path, shard_bytes=20_000)
    assert len(written) > 4 and written[-1].name == "model.safetensors.index.json"
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert_same_bytes(stored(checkpoint), stored(tmp_path))
    written_back, original = reference_of(tmp_path), reference_of(checkpoint)
    assert all(torch.equal(original.state_dict()[name], value) for name, value in written_back.state_dict().items())
    # They lie in mapped files, where some CPUs' kernels round by how they are aligned.
    torch.testing.assert_close(logits_of(written_back), logits_of(original), rtol=0, atol=1e-6)
    assert torch.equal(logits_of(load_model(str(tmp_path))), logits_of(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_export_in_another_dtype(source: str, dtype: str, gemma_reference, tmp_path: Path) -> None:
    """The text part is cast once; what belongs to images is carried as it is stored."""
    theirs = gemma_reference(seed=3).to(getattr(torch, source))
    theirs.save_pretrained(tmp_path / "in")
    # As the released configuration has it: the text part names a dtype of its own.
    values = json.loads((tmp_path / "in" / "config.json").read_text())
    values["text_config"]["dtype"] = source
    (tmp_path / "in" / "config.json").write_text(json.dumps(values))
    export(str(tmp_path / "in"), tmp_path / "out", dtype=dtype)
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    kind = getattr(torch, dtype)
    assert_same_bytes({k: v if k.startswith(VISION) else v.to(kind) for k, v in before.items()}, after)
    model = reference_of(tmp_path / "out")
    assert {parameter.dtype for parameter in model.model.decoder.parameters()} == {kind}
    assert model.dtype == kind
    assert torch.equal(logits_of(model), logits_of(reference_of(tmp_path / "in", dtype)))


def test_the_exported_configuration_is_the_one_that_came(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"t_max": 0.7}')
    export(str(tmp_path / "in"), tmp_path / "out")
    ours, theirs = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "in"))
    assert {k: v for k, v in ours.items() if k != "torch_dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"t_max": 0.7}'
    assert load_model(str(tmp_path / "out")).generation == {"t_max": 0.7}


def test_training_changes_the_text_part_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_folder(str(checkpoint), "checkpoint")
    model = build_model(plan, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    save_model(model, plan, tmp_path)
    before, after = stored(checkpoint), stored(tmp_path)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if not key.startswith(VISION) and not key.endswith("layer_scalar")}
    # As a run that resumes does it: into parameters that an optimizer holds.
    other = build_model(plan, None)
    held = {name: parameter for name, parameter in other.named_parameters()}
    fill(((key, whole_piece(tensor)) for key, tensor in other.state_dict().items()), tmp_path, FAMILY.files)
    assert all(held[name] is parameter for name, parameter in other.named_parameters())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def twins(tensors: dict[str, Tensor]) -> None:
    """Write tied weights a second time, as some tools do."""
    tensors["lm_head.weight"] = tensors[STACK + "embed_tokens.weight"].clone()
    for name in ("embed_tokens.weight", "norm.weight", "layers.0.self_attn.v_proj.weight", "layers.2.router.scale",
                 "layers.1.experts.gate_up_proj"):  # fmt: skip
        tensors[ENCODER + name] = tensors[STACK + name].clone()


def whole(folder: Path, config: Any) -> dict[str, Tensor]:
    """The folder through `read_slices`, two rows or columns of each tensor left out."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in empty_network(FAMILY, config).state_dict().items()}
    places = {key: tuple(slice(0, max(1, size - 1)) for size in shape) for key, shape in shapes.items()}
    return dict(read_slices(shapes, places, folder, FAMILY.files))


def test_tied_weights_may_be_written_twice(checkpoint: Path, tmp_path: Path) -> None:
    doubled = changed(checkpoint, tmp_path / "twice", twins)
    ours, plain = load_model(str(doubled)), load_model(str(checkpoint))
    assert torch.equal(logits_of(ours), logits_of(plain))
    assert_same_bytes(whole(doubled, plain.config), whole(checkpoint, plain.config))
    export(str(doubled), tmp_path / "once")
    assert_same_bytes(stored(tmp_path / "once"), stored(checkpoint))


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("lm_head.weight", STACK + "embed_tokens.weight"),
        (ENCODER + "norm.weight", STACK + "norm.weight"),
        (ENCODER + "layers.1.experts.gate_up_proj", STACK + "layers.1.experts.gate_up_proj"),
    ],
)
def test_tied_weights_that_differ_are_refused(name: str, tied: str, checkpoint: Path, tmp_path: Path) -> None:
    """One tensor serves both roles here; taking either would be another model."""

    def change(tensors: dict[str, Tensor]) -> None:
        twins(tensors)
        tensors[name].view(-1)[0] += 1e-3

    folder = changed(checkpoint, tmp_path / "untied", change)
    config = plan_folder(str(checkpoint), "x").config
    for read in (lambda: load_model(str(folder)), lambda: whole(folder, config)):
        with pytest.raises(ModelError, match=f"untied: {name} is not equal to {tied}, which it is tied to") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_twin_stands_in_for_its_original(checkpoint: Path, tmp_path: Path) -> None:
    """As in a file of which a tool kept one of two tied names, here of the norm and the embedding (two twins)."""

    def change(tensors: dict[str, Tensor]) -> None:
        twins(tensors)
        del tensors[STACK + "norm.weight"], tensors[STACK + "embed_tokens.weight"]

    folder = changed(checkpoint, tmp_path / "half", change)
    assert torch.equal(logits_of(load_model(str(folder))), logits_of(load_model(str(checkpoint))))
    differing = changed(folder, tmp_path / "differing", lambda tensors: tensors["lm_head.weight"].neg_())
    with pytest.raises(ModelError, match="is not equal to .*, which it is tied to"):
        load_model(str(differing))


@pytest.mark.parametrize(
    "name",
    [
        STACK + "embed_tokens.weight",
        STACK + "layers.2.experts.down_proj",
        STACK + "layers.0.layer_scalar",
        ENCODER + "layers.0.layer_scalar",
        STACK + "self_conditioning.pre_norm.weight",
    ],
)
def test_missing_tensors_are_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "less", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"less: tensor '{name}' is missing .1 in all"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        STACK + "layers.1.self_attn.v_proj.weight",  # a full layer has none
        STACK + "layers.3.layer_scalar",
        ENCODER + "layers.3.layer_scalar",
        ENCODER + "layers.3.mlp.up_proj.weight",
        "model.encoder.audio_tower.weight",
        "vision_tower.weight",
    ],
)
def test_tensors_without_a_place_are_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "more", lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(ModelError, match=f"more: tensor '{name}' has no place in this network"):
        load_model(str(folder))


def test_tensors_of_another_shape_are_named(checkpoint: Path, tmp_path: Path) -> None:
    name = STACK + "layers.1.self_attn.k_norm.weight"
    folder = changed(checkpoint, tmp_path / "odd", lambda tensors: tensors.update({name: torch.ones(8)}))
    with pytest.raises(ModelError, match=rf"odd: {name} has shape \(8,\), config.json says \(16,\)"):
        load_model(str(folder))


def test_a_fresh_network_has_no_vision_part(gemma_values: Callable[..., dict], tmp_path: Path) -> None:
    plan = plan_model(ModelConfig(config=gemma_values()))
    model, again, other = (build_model(plan, None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits_of(model), logits_of(again)) and not torch.equal(logits_of(model), logits_of(other))
    save_model(model, plan, tmp_path)
    assert not any(key.startswith(VISION) for key in stored(tmp_path))
    assert torch.equal(logits_of(load_model(str(tmp_path))), logits_of(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert parse_config(config, "config.json") == plan.config and config["torch_dtype"] == "float32"


def test_an_export_without_a_vision_tower_warns(checkpoint: Path, tmp_path: Path) -> None:
    def blind(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if FAMILY.files.passthrough(key)]:
            del tensors[key]

    source = changed(checkpoint, tmp_path / "in", blind)
    *_, warning = export(str(source), tmp_path / "out")
    assert f"{source} has no vision tower, so the exported folder has none either" in warning


def test_an_export_of_a_vision_tower_with_holes_names_them(checkpoint: Path, tmp_path: Path) -> None:
    """The released tower has many layers; the small one gets a second."""
    first = VISION[0] + "encoder.layers.0."

    def second_layer(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(first)]:
            tensors[key.replace(".0.", ".1.", 1)] = tensors[key].clone()

    whole = changed(checkpoint, tmp_path / "whole", second_layer)
    assert not any("vision tower" in warning for warning in export(str(whole), tmp_path / "out"))
    lost = sorted(key.replace(".0.", ".1.", 1) for key in stored(checkpoint) if key.startswith(first))[:2]

    def holes(tensors: dict[str, Tensor]) -> None:
        for key in lost:
            del tensors[key]

    *_, warning = export(str(changed(whole, tmp_path / "holes", holes)), tmp_path / "other")
    assert f"holes lacks {lost[0]} and 1 more tensors of its vision tower, so the exported folder lacks" in warning


def test_layers_of_one_stack_are_alike() -> None:
    keys = ["v.layers.0.a", "v.layers.0.b", "v.layers.2.a", "v.layers.2.b", "v.layers.3.a", "v.norm", "w.layers.0.c"]
    assert layer_gaps(keys) == ["v.layers.1.a", "v.layers.1.b", "v.layers.3.b"]
    assert layer_gaps(["v.mlp.0.weight", "v.mlp.2.bias"]) == []


def test_the_files_that_prepare_images_go_along(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "in")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "in" / name).write_text(f'{{"name": "{name}"}}')
    export(str(tmp_path / "in"), tmp_path / "out")
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
