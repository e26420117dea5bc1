"""Law: `unmask doctor` says what a run or a checkpoint would meet here, writes nothing, and its status is the worst."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.cli import main
from unmask.doctor import examine, machine, model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what has tests of its own: tracing attention takes seconds."""
    monkeypatch.setitem(examine.CHECKS, "attention", lambda _: iter(()))


def doctor(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Run it; return its status, and (level, text) of the findings of each check."""
    status = main(["doctor", *map(str, words), "--json"])
    found: dict[str, list[tuple[str, str]]] = {}
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == status
    for row in said["findings"]:
        text = f"{row['what']}; {row['remedy']}" if row["remedy"] else row["what"]
        found.setdefault(row["check"], []).append((row["level"], text))
    return status, found


def levels(found: dict[str, list[tuple[str, str]]], check: str) -> set[str]:
    return {level for level, _ in found.get(check, [])}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_machine_alone(capsys) -> None:
    status, found = doctor(capsys)
    assert status == 0 and not {"files", "tokenizer", "memory", "forward"} & found.keys()
    assert ("note", "not checked: the hub, which HF_HUB_OFFLINE says not to ask") in found["hub"]
    assert any("torch 2." in text for _, text in found["versions"])


def test_a_finding_is_a_line_without_colour(capsys, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "note") and line.split()[1] in examine.CHECKS for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_a_run_as_train_would_start_it(tiny, tmp_path: Path, capsys) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run"))
    before = listing(tmp_path)
    status, found = doctor(capsys, path)
    assert status == 0 and levels(found, "memory") == {"ok"} and levels(found, "forward") == {"ok"}
    assert "renders and supervises answers" in found["tokenizer"][0][1]
    assert listing(tmp_path) == before and not (tmp_path / "run").exists()
    status, found = doctor(capsys, path, "--step_scheduler.local_batch_size", "3", "--nproc-per-node", "2")
    assert status == 2 and "global_batch_size" in found["input"][0][1] and "files" not in found
    status, found = doctor(capsys, path, "--optimizer.lrr", "1")
    assert status == 2 and "did you mean 'lr'?" in found["input"][0][1] and levels(found, "versions") == {"ok"}


def test_memory_and_disk_beside_what_there_is(tiny, tmp_path: Path, capsys, monkeypatch) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run"))
    monkeypatch.setattr(model, "device_memory", lambda _: 1000)
    monkeypatch.setattr(model, "available_memory", lambda: 1000)
    monkeypatch.setattr(model, "free_disk", lambda _: 1000)
    status, found = doctor(capsys, path)
    assert status == 2 and [level for level, _ in found["memory"]] == ["error", "error"]
    assert found["memory"][0][1].endswith("start more processes")
    assert "lower checkpoint.max_recent_checkpoints" in found["memory"][1][1]
    assert "do not fit" in found["forward"][0][1]


def test_a_checkpoint_without_loading_it(tiny_base: Path, capsys) -> None:
    before = listing(tiny_base)
    status, found = doctor(capsys, tiny_base)
    assert status == 0, found
    assert (
        "every tensor of the network is there" in found["files"][0][1] and "manifest.json says" in found["files"][1][1]
    )
    assert ("ok", "mask_token_id 261 is '<|mdm_mask|>'") in found["tokenizer"]
    assert listing(tiny_base) == before


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "checkpoint")


def rewrite(folder: Path, **changes: object) -> None:
    """Change fields of config.json; what would tell goes."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    forget(folder)


def forget(folder: Path) -> None:
    """Take what a run knows of a checkpoint away, as if another tool had written it."""
    for name in ("manifest.json", "state.json"):
        (folder / name).unlink(missing_ok=True)


def test_a_tensor_of_another_shape_or_missing(copied: Path, capsys) -> None:
    rewrite(copied, n_layers=3)
    status, found = doctor(capsys, copied)
    assert status == 2 and "is missing" in found["files"][-1][1]
    rewrite(copied, n_layers=2, mlp_hidden_size=64)
    status, found = doctor(capsys, copied)
    assert status == 2 and "config.json says" in found["files"][-1][1]


def test_weights_that_give_no_number(copied: Path, capsys) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.transformer.ln_f.weight"] *= torch.nan
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    forget(copied)
    status, found = doctor(capsys, copied)
    assert (status, levels(found, "forward"), levels(found, "files")) == (2, {"error"}, {"ok", "note"})


def test_a_file_of_another_size_than_the_manifest_says(copied: Path, capsys) -> None:
    (copied / "tokenizer_config.json").write_text("{}")
    status, found = doctor(capsys, copied)
    assert status == 2 and "tokenizer_config.json has another size than manifest.json says" in found["files"][-1][1]


def test_a_manifest_that_is_lost(copied: Path, capsys) -> None:
    (copied / "manifest.json").unlink()
    status, found = doctor(capsys, copied)
    assert status == 2 and "manifest.json, which a run wrote, is missing" in found["files"][-1][1]


def test_a_changed_bit_that_the_network_does_not_show(copied: Path, capsys) -> None:
    content = bytearray((copied / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "model.safetensors").write_bytes(content)
    status, found = doctor(capsys, copied)
    assert status == 2 and "model.safetensors does not match its checksum" in found["forward"][-1][1]


def test_a_mask_that_text_can_hold(copied: Path, capsys) -> None:
    rewrite(copied, mask_token_id=65)
    status, found = doctor(capsys, copied)
    assert (
        status == 2
        and ("error", "mask_token_id 65 is 'b', which ordinary text holds, too; correct config.json")
        in (found["tokenizer"])
    )


def test_no_chat_template_and_no_tokenizer(copied: Path, capsys) -> None:
    forget(copied)
    (copied / "chat_template.jinja").unlink()
    status, found = doctor(capsys, copied)
    assert status == 1 and "has no chat template" in found["tokenizer"][-1][1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    status, found = doctor(capsys, copied)
    assert status == 2 and "has no tokenizer" in found["tokenizer"][0][1] and levels(found, "forward") == {"ok"}


def test_a_place_that_is_none(tmp_path: Path, capsys) -> None:
    for name in (tmp_path / "nowhere", tmp_path, tmp_path / "no.yaml", "owner/name"):
        status, found = doctor(capsys, name)
        assert status == 2 and levels(found, "input") == {"error", "note"} and "files" not in found


def test_what_belongs_to_a_run_is_refused_without_one(tiny_base: Path, capsys) -> None:
    for words in (["--optimizer.lr", "1"], [str(tiny_base), "--nproc-per-node", "2"], ["--nproc-per-node", "0"]):
        assert main(["doctor", *words]) == 2
        assert capsys.readouterr().err.startswith(f"unmask: error: {words[-2]}: ")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(capsys, monkeypatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(machine, "available_memory", broken)
    status, found = doctor(capsys)
    assert status == 2 and levels(found, "experts") == {"ok"}
    assert found["devices"] == [("error", "the check itself failed: RuntimeError: no kernel image is available")]


def test_a_hub_that_does_not_answer(capsys, monkeypatch) -> None:
    class Session:
        def head(self, address: str, timeout: float) -> None:
            raise OSError("Network is unreachable")

    monkeypatch.setattr(machine.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(machine.huggingface_hub, "get_session", Session)
    status, found = doctor(capsys)
    assert status == 0 and "Network is unreachable" in found["hub"][0][1]
