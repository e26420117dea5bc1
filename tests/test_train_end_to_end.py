"""From a configuration to an answer: train, export, sample, with the commands that a user types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from unmask.cli import main

IDS = torch.tensor([[3, 70, 261, 261, 12, 257]])


@pytest.fixture(scope="module")
def full(tiny, train_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tiny.config(tmp_path_factory.mktemp("full"), step_scheduler__max_steps=3)).root


@pytest.fixture(scope="module")
def adapter(full: Path, tiny, train_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny.config(
        tmp_path_factory.mktemp("adapter"),
        peft={"r": 4, "target_modules": ["*.q_proj", "*.ff_out"]},
        optimizer__lr=0.03,
    )
    values["model"] = {"pretrained_model_name_or_path": str(full)}
    return train_tiny(values).root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS))


def answer(tmp_path: Path, *words: str) -> dict:
    path = tmp_path / "answers.jsonl"
    flags = ["--steps", "4", "--max_new_tokens", "8", "--block-size", "8", "--device", "cpu", "--output", str(path)]
    assert main(["generate", "--prompt", "1 plus 1?", *flags, *words]) == 0
    record = json.loads(path.read_text().splitlines()[0])
    path.unlink()  # a file that is there is not replaced
    return record


def test_the_command_line_trains(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run"))
    assert main(["train", "-c", str(path), "--step_scheduler.max_steps", "2", "--seed=5"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and f"finished after step 2; run directory: {tmp_path / 'run'}" in printed.out
    assert "step 1/2  loss" in printed.out and "\x1b" not in printed.out
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_directory_is_sampled_from(full: Path, tmp_path: Path) -> None:
    record = answer(tmp_path, "--checkpoint", str(full))
    assert record["finish_reason"] in ("eos", "length") and record["nfe"] == 4
    assert record == {**answer(tmp_path, "--checkpoint", str(full)), "tokens_per_second": record["tokens_per_second"]}


def test_export_is_read_alike_by_us_and_by_transformers(full: Path, tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", "--checkpoint", str(full), "--output", str(tmp_path / "plain")]) == 0
    plain = tmp_path / "plain"
    assert {path.name for path in plain.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not {"optimizer", "state.json", "manifest.json"} & {path.name for path in plain.iterdir()}
    trained = logits(unmask.load_model(str(full)))
    torch.testing.assert_close(logits(unmask.load_model(str(plain))), trained, rtol=0, atol=0)
    unmask.register()
    theirs = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, trained, rtol=1e-5, atol=1e-5)
    from unmask.data.template_source import read_template

    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.chat_template == read_template("llada")
    before, after = (load_file(folder / "model.safetensors") for folder in (full / "latest", plain))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_export_changes_the_dtype_only_when_asked(full: Path, tmp_path: Path) -> None:
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        folder = tmp_path / name
        assert main(["export", "--checkpoint", str(full), "--output", str(folder), "--dtype", name]) == 0
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
        again = tmp_path / f"{name}-again"
        assert main(["export", "--checkpoint", str(folder), "--output", str(again)]) == 0
        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_export_without_a_tokenizer_warns(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(full / "latest", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    assert main(["export", "--checkpoint", str(tmp_path / "bare"), "--output", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and "no tokenizer" in err and err.count("\n") == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_failed_export_leaves_nothing(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unmask.models import loading

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "save_weights", fail)
    assert main(["export", "--checkpoint", str(full), "--output", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_checkpoint_holds_the_adapter_alone(adapter: Path) -> None:
    names = {path.name for path in (adapter / "latest").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names and "config.json" not in names


def test_an_adapter_given_as_a_checkpoint_is_told_its_base(
    full: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["export", "--output", str(tmp_path / "out")], ["generate", "--prompt", "hi"]):
        assert main([*words, "--checkpoint", str(adapter)]) == 2
        said = capsys.readouterr().err
        assert f"{adapter} is an adapter" in said
        assert f"--checkpoint {full / 'latest'} --adapter {adapter}" in said


def test_an_adapter_records_the_hub_id_of_its_base(full: Path, tiny, train_tiny, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(full / "latest"))
    values = tiny.config(tmp_path / "run", peft={"r": 2}, step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": "owner/base"}
    recorded = json.loads((train_tiny(values).root / "latest" / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == "owner/base"


def test_files_of_a_checkpoint_are_as_readable_as_others(full: Path, adapter: Path) -> None:
    for folder in (full / "latest", adapter / "latest"):
        ordinary = (folder / "state.json").stat().st_mode
        assert {path.stat().st_mode for path in folder.rglob("*") if path.is_file()} == {ordinary}


def test_generation_settings_come_along(full: Path, tiny, train_tiny, tmp_path: Path) -> None:
    source, settings = tmp_path / "source", {"mask_token_id": 261}
    shutil.copytree(full / "latest", source)
    (source / "generation_config.json").write_text(json.dumps(settings))
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": str(source)}
    run = train_tiny(values)
    assert main(["export", "--checkpoint", str(run.root), "--output", str(tmp_path / "plain")]) == 0
    for folder in (run.root / "latest", tmp_path / "plain"):
        written = json.loads((folder / "generation_config.json").read_text())
        assert written == {**settings, "eos_token_id": [257, 260]}  # EOS, and what the template closes an answer with


def test_an_adapter_is_applied_and_merged_alike(full: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    words = ["export", "--checkpoint", str(full), "--adapter", str(adapter), "--output", str(merged)]
    assert main(words) == 0
    base, applied = logits(unmask.load_model(str(full))), logits(unmask.load_model(str(full), adapter=str(adapter)))
    assert (base - applied).abs().max() > 0.01
    torch.testing.assert_close(logits(unmask.load_model(str(merged))), applied, rtol=1e-4, atol=1e-4)
    assert (merged / "chat_template.jinja").is_file()
    on_top = answer(tmp_path, "--checkpoint", str(full), "--adapter", str(adapter))
    assert answer(tmp_path, "--checkpoint", str(merged))["token_ids"] == on_top["token_ids"]


def test_a_merged_model_keeps_the_dtype_of_each_tensor(full: Path, adapter: Path, tmp_path: Path) -> None:
    mixed, merged = shutil.copytree(full / "latest", tmp_path / "mixed"), tmp_path / "merged"
    tensors = load_file(mixed / "model.safetensors")
    kinds = {key: torch.float32 if tensor.dim() == 1 else torch.bfloat16 for key, tensor in tensors.items()}
    save_file({key: tensor.to(kinds[key]) for key, tensor in tensors.items()}, mixed / "model.safetensors")
    for name in ("manifest.json", "state.json"):
        (mixed / name).unlink()
    words = ["export", "--checkpoint", str(mixed), "--adapter", str(adapter), "--output", str(merged)]
    assert main(words) == 0
    written = load_file(merged / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in written.items()} == kinds
    assert len(set(kinds.values())) == 2


def test_an_adapter_brings_the_chat_template_it_was_trained_with(full: Path, adapter: Path, tmp_path: Path) -> None:
    from unmask.training.export import tokenizer_folder

    shutil.copytree(full / "latest", tmp_path / "base", ignore=shutil.ignore_patterns("*.jinja"))
    assert tokenizer_folder(str(tmp_path / "base"), str(adapter)) == adapter / "latest"
    answer(tmp_path, "--checkpoint", str(tmp_path / "base"), "--adapter", str(adapter))


def test_fine_tuning_starts_from_a_checkpoints_weights(full: Path, tiny, train_tiny, tmp_path: Path) -> None:
    values = tiny.config(tmp_path, step_scheduler__max_steps=1, optimizer__lr=0.0)
    values["model"] = {"pretrained_model_name_or_path": str(full)}
    del values["dataset"]["tokenizer"]  # the checkpoint has its own
    run = train_tiny(values)
    assert (run.root / "latest" / "model.safetensors").read_bytes() == (
        full / "latest" / "model.safetensors"
    ).read_bytes()
