"""Checkpoints as other tools leave them: a tied head stored twice, wrappers' names, stale files, pickles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.cli import main
from unmask.errors import ModelError
from unmask.models.family import PLAIN_LAYOUT
from unmask.models.loading import load_model
from unmask.models.registry import plan_folder
from unmask.models.weights import save_weights
from unmask.models.wrappers import misplaced, network_key
from unmask.training.export import export

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])
EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


@pytest.fixture
def state(reference_folder: Path) -> dict[str, Tensor]:
    return load_file(reference_folder / "model.safetensors")


@pytest.fixture
def written(reference_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a checkpoint: its tensors, and fields over the reference's config.json."""

    def write(tensors: dict[str, Tensor], name: str = "checkpoint", **fields: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        values = json.loads((reference_folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | fields))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


def logits(folder: Path) -> Tensor:
    model: Any = load_model(str(folder))
    with torch.no_grad():
        return model.logits(model(TOKENS))


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tied_head_that_is_stored_as_well_is_read_if_it_is_equal(state: dict[str, Tensor], written) -> None:
    tied = {key: tensor for key, tensor in state.items() if key != HEAD}
    expected = logits(written(tied, "tied", weight_tying=True))
    both = written({**tied, HEAD: tied[EMBEDDING].clone()}, "both", weight_tying=True)
    assert torch.equal(logits(both), expected)
    wider = written({**tied, HEAD: tied[EMBEDDING].double()}, "wider", weight_tying=True)
    assert torch.equal(logits(wider), expected)
    alone = written({key: value for key, value in state.items() if key != EMBEDDING}, "alone", weight_tying=True)
    assert torch.equal(logits(alone), logits(written({**tied, EMBEDDING: state[HEAD]}, "moved", weight_tying=True)))
    half = {key: value.bfloat16() for key, value in state.items() if key != EMBEDDING}
    assert load_model(str(written(half, "half", weight_tying=True))).state_dict()[EMBEDDING].dtype == torch.bfloat16
    export(str(both), both.parent / "out")
    assert sorted(load_file(both.parent / "out" / "model.safetensors")) == sorted(tied)


def test_a_tied_head_that_differs_is_refused_by_name(state: dict[str, Tensor], written) -> None:
    folder = written(state, weight_tying=True)
    assert f"{HEAD} is not equal to {EMBEDDING}, which it is tied to" in refused(lambda: logits(folder))
    narrow = written({**state, HEAD: state[HEAD][:5].clone()}, "narrow", weight_tying=True)
    assert f"{HEAD} has shape (5, 64), config.json says (512, 64)" in refused(lambda: logits(narrow))


WRAPPED = {
    "_orig_mod.": "of torch.compile",
    "module.": "of DataParallel, DDP or DeepSpeed",
    "base_model.model.": "of PEFT",
    "module._orig_mod.": "of torch.compile",
    "_forward_module.module.": "",
    "model.": "",
    "policy.base_model.model.": "",
}


@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_wrappers_prefix_is_named_and_taken_off(prefix: str, state: dict[str, Tensor], written, capsys) -> None:
    folder = written({prefix + key: tensor for key, tensor in state.items()})
    message = refused(lambda: load_model(str(folder)))
    assert f"'{prefix}model.transformer." in message and "is 'model.transformer." in message
    assert WRAPPED[prefix] in message and "`unmask export --strip-prefix --checkpoint FOLDER --output NEW`" in message
    output = folder.parent / "clean"
    assert main(["export", "--strip-prefix", "--checkpoint", str(folder), "--output", str(output)]) == 0
    clean = load_file(output / "model.safetensors")
    assert sorted(clean) == sorted(state) and all(torch.equal(clean[key], state[key]) for key in state)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]


def test_a_wrapper_of_single_blocks_is_named_and_taken_off(state: dict[str, Tensor], written) -> None:
    """As `block.compile()`-like wrapping, FSDP and activation checkpointing leave them."""
    inner = {key.replace(".blocks.1.", ".blocks.1._checkpoint_wrapped_module."): value for key, value in state.items()}
    folder = written(inner)
    assert "blocks.1._checkpoint_wrapped_module." in refused(lambda: load_model(str(folder)))
    export(str(folder), folder.parent / "clean", strip_prefix=True)
    assert sorted(load_file(folder.parent / "clean" / "model.safetensors")) == sorted(state)


def test_what_cannot_be_stripped_is_said_and_leaves_nothing(state: dict[str, Tensor], written) -> None:
    plain = written(state, "plain")
    output = plain.parent / "out"
    assert "have no wrapper's prefix; leave it out" in refused(lambda: export(str(plain), output, strip_prefix=True))
    copies = {f"{role}.{key}": tensor.clone() for key, tensor in state.items() for role in ("student", "teacher")}
    twice = written(copies, "twice")
    assert "twice, as 'student.model." in refused(lambda: export(str(twice), output, strip_prefix=True))
    foreign = written({f"module.{key}": value for key, value in [*state.items(), ("other", torch.ones(2))]}, "foreign")
    assert "'module.other' has no place" in refused(lambda: export(str(foreign), output, strip_prefix=True))
    assert not output.exists() and not list(plain.parent.glob(".*part"))


def test_an_adapter_that_was_not_merged_is_not_mistaken_for_a_prefix(state: dict[str, Tensor], written) -> None:
    adapted = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    query = "base_model.model.model.transformer.blocks.0.q_proj"
    adapted[f"{query}.base_layer.weight"] = adapted.pop(f"{query}.weight")
    adapted |= {
        f"{query}.lora_A.default.weight": torch.ones(2, 64),
        f"{query}.lora_B.default.weight": torch.ones(64, 2),
    }
    folder = written(adapted)
    for action in (
        lambda: load_model(str(folder)),
        lambda: export(str(folder), folder.parent / "out", strip_prefix=True),
    ):
        assert "is of an adapter that PEFT has not merged; merge it (merge_and_unload)" in refused(action)


def test_the_longest_end_that_fits_is_the_networks_key() -> None:
    network = {"a.weight": 0, "b.a.weight": 0}
    for key, found in {
        "x.b.a.weight": "b.a.weight",
        "x.a.weight": "a.weight",
        "a.weight": "a.weight",
        "c": None,
    }.items():
        assert network_key(key, lambda name: PLAIN_LAYOUT.holds(name, network)) == found
    assert misplaced(["a.weight", "c"], network.__contains__) == ""


def test_the_gemma_prefixes_go_with_its_vision_tower(fixtures: Path, tmp_path: Path) -> None:
    source, folder = fixtures / "diffusion_gemma_step", tmp_path / "wrapped"
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    save_file(
        {f"module.{key}": tensor for key, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "'module.model." in refused(lambda: load_model(str(folder)))
    export(str(folder), tmp_path / "clean", strip_prefix=True)
    export(str(source), tmp_path / "plain")
    assert (tmp_path / "clean" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


def test_a_single_file_beside_an_index_is_said_by_every_command(
    state: dict[str, Tensor], tiny, tiny_base: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "stale"
    shutil.copytree(tiny_base, folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_weights(whole.items(), folder, 20_000)
    assert plan_folder(str(folder), "x").notes == ()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    (note,) = plan_folder(str(folder), "x").notes
    assert note.startswith(
        f"{folder}: model.safetensors is read, as transformers does, and the shards of model.safeten"
    )
    short = ["--max_new_tokens", "4", "--steps", "2"]
    commands = {
        "generate": ["--prompt", "so?", *short],
        "eval": ["--tasks", "gsm8k", "--data", str(tiny.folder / "train.jsonl"), "--limit", "1", *short],
        "export": [],
    }
    for command, words in commands.items():
        output = ["--output", str(tmp_path / command)] if command != "generate" else []
        assert main([command, "--checkpoint", str(folder), *words, *output]) == 0
        printed = capsys.readouterr()
        assert "the shards of model.safetensors.index.json beside it are not" in printed.out + printed.err, command
    with pytest.warns(UserWarning, match="beside it are not"):
        load_model(str(folder))


def test_a_run_says_which_weights_it_starts_from(tiny, train_tiny, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stale"
    shutil.copytree(tiny_base, folder)
    save_weights(load_file(folder / "model.safetensors").items(), folder, 20_000)
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": str(folder)}
    assert "warning: " in (printed := train_tiny(values).output) and "the older of the two" in printed


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"])
def test_pickled_weights_are_named(name: str, reference_folder: Path, tmp_path: Path) -> None:
    shutil.copy(reference_folder / "config.json", tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert "training_args" not in refused(lambda: load_model(str(tmp_path)))
    (tmp_path / name).write_bytes(b"x")
    assert f"; {name} is a pickle, which is not read, since it may run code" in refused(
        lambda: load_model(str(tmp_path))
    )


def test_the_command_line_says_it_in_one_line(state: dict[str, Tensor], written, capsys) -> None:
    folder = written({f"_orig_mod.{key}": tensor for key, tensor in state.items()})
    assert main(["export", "--checkpoint", str(folder), "--output", str(folder.parent / "out")]) == 2
    assert "--strip-prefix" in capsys.readouterr().err
