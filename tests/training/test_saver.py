"""The saver on one process: in the background, whole or not there, and what a disk says against it."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from unmask.config.model import ModelConfig
from unmask.config.results import CheckpointConfig
from unmask.distributed.runtime import Runtime
from unmask.errors import CheckpointError
from unmask.models.registry import plan_model
from unmask.training import saver as saver_module
from unmask.training.checkpoint import verify
from unmask.training.network import Network
from unmask.training.saver import Saver

CPU = Runtime(torch.device("cpu"), None)
BESIDE = {"config.yaml": b"seed: 1\n", "sub/more": b"m"}


@pytest.fixture
def network(tiny) -> Network:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    return Network(model, optimizer, plan_model(ModelConfig(config=tiny.model)), "float32", None, None, None)


@pytest.fixture
def saver(network: Network, tmp_path: Path) -> Saver:
    return Saver(tmp_path, CheckpointConfig(), network, CPU, BESIDE, None)


def step(network: Network) -> None:
    network.model(torch.ones(1, 3)).sum().backward()
    network.optimizer.step()


def save(saver: Saver, number: int) -> None:
    saver.save(number, {"loader": {}, "identity": {}, "best": None}, last=False)
    saver.wait()


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_what_lies_in_a_checkpoint(network: Network, saver: Saver, tmp_path: Path) -> None:
    step(network)
    save(saver, 1)
    folder = tmp_path / "step_1"
    verify(folder)
    assert saver.newest == folder and saver.poll()[0]["folder"] == folder and saver.poll() == []
    assert names(folder) == {"config.yaml", "manifest.json", "model.safetensors", "optimizer", "state.json", "sub"}
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], parameter) for name, parameter in network.model.named_parameters())
    moments = load_file(folder / "optimizer" / "model.safetensors")
    assert set(moments) == {f"{p}/{m}" for p in ("weight", "bias") for m in ("exp_avg", "exp_avg_sq", "step")}
    assert json.loads((folder / "state.json").read_text())["step"] == 1


def test_the_same_values_are_the_same_bytes(network: Network, saver: Saver, tmp_path: Path) -> None:
    step(network)
    for number in (1, 2, 3):
        save(saver, number)
    for name in ("model.safetensors", "optimizer/model.safetensors"):
        assert len({(tmp_path / f"step_{number}" / name).read_bytes() for number in (1, 2, 3)}) == 1


def test_training_goes_on_meanwhile_and_the_update_waits(
    network: Network, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, may_write, save_weights = threading.Event(), threading.Event(), saver_module.save_weights

    def slowly(*arguments: Any) -> list[Path]:
        assert may_write.wait(60)
        return save_weights(*arguments)

    step(network)
    before = network.model.weight.detach().clone()
    monkeypatch.setattr(saver_module, "save_weights", slowly)
    saver.save(1, {}, last=False)
    loss = network.model(torch.ones(1, 3)).sum()  # forward and backward run
    loss.backward()
    assert saver.poll() == [] and not (tmp_path / "step_1").exists()

    def update() -> None:
        network.optimizer.step()
        written.set()

    thread = threading.Thread(target=update)
    thread.start()
    assert not written.wait(0.2)
    may_write.set()
    thread.join()
    saver.wait()
    assert torch.equal(load_file(tmp_path / "step_1" / "model.safetensors")["weight"], before)
    assert not torch.equal(network.model.weight, before)
    (news,) = saver.poll()
    assert 0.1 < news["pause_seconds"] <= news["seconds"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("where", ["save_weights", "write_state", "list_files", "commit_checkpoint"])
def test_a_failed_write_leaves_nothing_and_touches_nothing(
    network: Network, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    step(network)
    save(saver, 2)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(saver_module, where, fail)
    saver.save(4, {}, last=False)
    with pytest.raises(CheckpointError) as caught:
        saver.wait()
    said = str(caught.value)
    assert str(tmp_path / "step_4") in said and os.strerror(number) in said and "\n" not in said
    assert names(tmp_path) == {"step_2", "latest"} and os.readlink(tmp_path / "latest") == "step_2"
    verify(tmp_path / "step_2")
    assert saver.newest == tmp_path / "step_2"


def test_a_failed_rename_leaves_the_older_ones(
    network: Network, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(network)
    save(saver, 2)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".step"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="step_4"):
        save(saver, 4)
    assert names(tmp_path) == {"step_2", "latest"}


def test_a_folder_that_cannot_be_made_is_said_at_once(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"step_4: .*Read-only file system"):
        saver.save(4, {}, last=False)


@pytest.mark.parametrize("limit", [100, 50_000])
def test_a_full_disk_as_the_writers_meet_it(
    network: Network, tmp_path: Path, limit: int, small_files: Callable[[int], None]
) -> None:
    """As safetensors report it, and as Python's own files do."""
    model = nn.Linear(100, 1000)
    big = Network(model, torch.optim.AdamW(model.parameters()), network.plan, "float32", None, None, None)
    saver = Saver(tmp_path, CheckpointConfig(), big, CPU, {"tokenizer.json": bytes(200)}, None)
    small_files(limit)
    saver.save(1, {}, last=False)
    with pytest.raises(CheckpointError, match=r"could not be saved .*File too large"):
        saver.wait()
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("limit", "file"),
    [
        (0, "small/f00"),
        (20, "state.json"),
        (120, "shard-0.part"),
        (1000, "manifest.json"),
    ],
)
def test_a_failed_save_names_the_file(
    network: Network, tmp_path: Path, limit: int, file: str, small_files: Callable[[int], None]
) -> None:
    few = {f"small/f{number:02}": b"12345" for number in range(30)}  # so that the manifest is the largest of all
    saver = Saver(tmp_path, CheckpointConfig(), network, CPU, few, None)
    step(network)
    small_files(limit)
    saver.save(1, {}, last=False)
    with pytest.raises(CheckpointError, match=rf"step_1: the checkpoint could not be saved \(\S*{file}: .*File too l"):
        saver.wait()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("call", [0, 1, 2, 3, 4, 5])
def test_a_disk_that_fails_at_the_last_moment_is_named_with_the_file(
    network: Network, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls, sync = iter(range(100)), os.fsync

    def fail(handle: int) -> None:
        if next(calls) == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    step(network)
    with pytest.raises(CheckpointError, match=rf"could not be saved \({tmp_path}\S+: Input/output error\)"):
        save(saver, 1)
    assert not list(tmp_path.glob(".step*"))


@pytest.fixture
def small_files():
    """Return a function that lets files of this process grow to some bytes and no further."""
    import resource
    import signal

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_mistake_in_the_program_is_not_reported_as_trouble_with_the_disk(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(saver_module, "save_weights", fail)
    saver.save(1, {}, last=False)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        saver.wait()


def test_the_thread_that_saves_is_on_the_runs_device_before_it_touches_one(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread starts on CUDA device 0, and there every rank would make a context."""
    seen: list[tuple[str, object]] = []

    def note(what: object) -> None:
        seen.append((threading.current_thread().name, what))

    monkeypatch.setattr(torch.cuda, "set_device", note)
    monkeypatch.setattr(saver_module, "_device_is_ready", lambda _: lambda: note("copies"))
    save(Saver(tmp_path, CheckpointConfig(), network, Runtime(torch.device("cuda", 3), None), BESIDE, None), 1)
    assert seen == [("unmask-save", torch.device("cuda", 3)), ("unmask-save", "copies")]


@pytest.mark.filterwarnings("ignore:Ignoring pin_memory")  # which needs CUDA
def test_copies_are_made_in_that_thread(
    network: Network, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    stage = StateDictStager.stage

    def noted(self: Any, tensors: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return stage(self, tensors, **options)

    monkeypatch.setattr(StateDictStager, "stage", noted)
    saver._stager = saver_module.host_copies()
    step(network)
    save(saver, 1)
    assert threads == ["unmask-save"]
    assert torch.equal(load_file(tmp_path / "step_1" / "model.safetensors")["weight"], network.model.weight)
