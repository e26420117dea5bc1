"""Several ranks start together, speak with one voice and end together."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from unmask.distributed.processes import process_rank, world_size
from unmask.distributed.ranks import ALONE, from_first
from unmask.errors import CheckpointError, ConfigError
from unmask.report.metrics import read_metrics
from unmask.training.checkpoint import verify

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), process_rank()) == (1, 0)
    assert ALONE.sum([1.0, 2.0]) == [1.0, 2.0] and ALONE.largest(3) == 3 and ALONE.gather("x") == ["x"]
    assert from_first(ALONE, lambda: 5) == 5 and ALONE.first
    ALONE.agree({"configuration": "a"})
    for value in ("-1", "0", "two"):
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(ConfigError, match="WORLD_SIZE"):
            world_size()


def test_collectives_give_every_rank_the_same(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(2, "collectives", None)
    assert first == second
    assert first["sum"] == [2.0, 1.0] and first["tensor"] == [1.0, 1.0] and first["largest"] == 10
    assert first["gather"] == [{"rank": 0}, {"rank": 1}] and first["from_first"] == "rank 0"
    assert first["failed"] == "only rank 0 sees this"
    assert first["agree"] == (
        "rank 1 has another data than rank 0 (1, not 0); start all ranks with the same files, arguments and packages"
    )


class Ended:
    """How the ranks of a command ended: their exit statuses (None = killed), and what each printed.

    They end together: the last one at most 35 seconds after the first.
    """

    def __init__(self, folder: Path, processes: list[Any]) -> None:
        sentinels, until = [process.sentinel for process in processes], time.monotonic() + 90
        wait(sentinels, 90)
        until = min(until, time.monotonic() + 35)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        stuck = [process for process in processes if process.is_alive()]
        for process in stuck:
            process.kill()
        self.said = [(folder / f"rank{rank}.err").read_text() for rank in range(len(processes))]
        assert not stuck, self.said
        notes = [folder / f"rank{rank}" for rank in range(len(processes))]
        self.status = [pickle.loads(note.read_bytes()) if note.is_file() else None for note in notes]

    @property
    def errors(self) -> list[str]:
        return [line for text in self.said for line in text.splitlines() if "error:" in line or "Traceback" in line]


@pytest.fixture
def command(start_ranks, tmp_path: Path) -> Callable[..., Ended]:
    """Return a function that runs `unmask train` on two ranks and waits for their end."""

    def run(*words: str, trouble: tuple = (), bad_data: tuple = ()) -> Ended:
        place = tmp_path / "notes"
        program = "command_with_trouble" if trouble else "command_with_bad_data" if bad_data else "command"
        return Ended(place, start_ranks(place, 2, program, ["train", *words], *trouble, *bad_data))

    return run


@pytest.fixture
def config(tiny, tmp_path: Path) -> Path:
    values = tiny.config(tmp_path / "run", step_scheduler__ckpt_every_steps=2)
    return tiny.write(tmp_path / "run.yaml", values)


def test_a_mistake_that_all_ranks_see_is_said_once(command, config: Path) -> None:
    ended = command("-c", str(config), "--optimizer.learning_rate", "1")
    assert ended.status == [2, 2] and len(ended.errors) == 1 and "optimizer.learning_rate" in ended.errors[0]


def test_rank_0_alone_talks(command, config: Path, tmp_path: Path) -> None:
    ended = command("-c", str(config), "--step_scheduler.max_steps", "1")
    assert ended.status == [0, 0] and ended.said[1] == ""
    assert f"finished after step 1; run directory: {tmp_path / 'run'}" in ended.said[0]


def test_ranks_with_other_configurations_are_told(command, tiny, tmp_path: Path) -> None:
    for rank in range(2):
        tiny.write(tmp_path / f"run{rank}.yaml", tiny.config(tmp_path / "run", optimizer__lr=1e-3 * (rank + 1)))
    ended = command("-c", str(tmp_path / "run{rank}.yaml"))
    assert ended.status == [2, 2] and len(ended.errors) == 1
    assert "rank 1 has another configuration than rank 0" in ended.errors[0] and not (tmp_path / "run").exists()


def test_ranks_with_other_data_are_told(command, tiny, tmp_path: Path) -> None:
    rows = (tiny.folder / "train.jsonl").read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"data{rank}").mkdir()
        (tmp_path / f"data{rank}" / "train.jsonl").write_text("".join(rows[rank:]))
    (tmp_path / "data").symlink_to("data0")
    values = tiny.config(tmp_path / "run", dataset__path_or_dataset_id=str(tmp_path / "data" / "train.jsonl"))
    path = tiny.write(tmp_path / "run.yaml", values)
    # The same path in the configuration, other content behind it, as on a machine with a disk of its own.
    ended = command("-c", str(path), "--dataset.path_or_dataset_id", str(tmp_path / "data{rank}" / "train.jsonl"))
    assert ended.status == [2, 2] and "rank 1 has another" in ended.errors[0] and len(ended.errors) == 1


def test_degrees_that_do_not_fit_are_said_once(command, config: Path, tmp_path: Path) -> None:
    ended = command("-c", str(config), "--distributed.dp_size", "3")
    assert ended.status == [2, 2] and len(ended.errors) == 1
    assert "distributed.dp_size: 3, but this run has 2 processes" in ended.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused_once(command, tiny, train_tiny, tmp_path: Path) -> None:
    train_tiny(tiny.config(tmp_path / "run", step_scheduler__max_steps=1))
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=2)
    values["model"] = {"config": {**tiny.model, "n_layers": 1}}
    ended = command("-c", str(tiny.write(tmp_path / "run.yaml", values)))
    assert ended.status == [2, 2] and len(ended.errors) == 1
    assert "step_1 is foreign" in ended.errors[0] and "checkpoint.checkpoint_dir" in ended.errors[0]
    verify(tmp_path / "run" / "step_1")


def test_weights_with_another_vocabulary_are_refused_once(command, tiny, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    for name in ("manifest.json", "state.json"):  # with them the change would be damage
        (folder / name).unlink()
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "vocab_size": 272, "embedding_size": 272}))
    values = tiny.config(tmp_path / "run")
    values["model"] = {"pretrained_model_name_or_path": str(folder)}
    ended = command("-c", str(tiny.write(tmp_path / "run.yaml", values)))
    assert ended.status == [2, 2] and len(ended.errors) == 1
    assert "has shape (264, 32), config.json says (272, 32)" in ended.errors[0]


@pytest.mark.parametrize("more", [[], ["--shard"], None], ids=["whole", "shared", "train"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_changed_bit_is_said_once(
    command, start_ranks, tiny, tiny_base: Path, tmp_path: Path, file: str, more: list[str] | None, device: str
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1 if file == "model.safetensors" else ord("\n") ^ ord(" ")  # each in another rank's share
    (folder / file).write_bytes(content)
    if more is None:
        values = {**tiny.config(tmp_path / "run"), "model": {"pretrained_model_name_or_path": str(folder)}}
        ended = command("-c", str(tiny.write(tmp_path / "run.yaml", values)))
    else:
        prompts = ["--prompt", "so?", "--prompt", "1?", "--steps", "1", "--max_new_tokens", "1", "--device", device]
        words = ["generate", "--checkpoint", str(folder), *prompts, *more]
        ended = Ended(tmp_path / "notes", start_ranks(tmp_path / "notes", 2, "command", words))
    assert ended.status == [2, 2] and len(ended.errors) == 1, ended.said
    assert f"base is damaged: {file} does not match its checksum" in ended.errors[0]


def test_a_network_too_large_to_be_drawn_is_refused_once(command, tiny, tmp_path: Path) -> None:
    values = {**tiny.config(tmp_path / "run"), "model": {"config": {**tiny.model, "d_model": 2**17, "n_layers": 100}}}
    ended = command("-c", str(tiny.write(tmp_path / "run.yaml", values)))
    assert ended.status == [2, 2] and len(ended.errors) == 1, ended.said
    assert "since each of 2 processes draws them whole" in ended.errors[0]


def test_a_tokenizer_of_another_vocabulary_is_refused_once(command, tiny, tmp_path: Path) -> None:
    values = tiny.config(tmp_path / "run")
    values["model"] = {"config": {**tiny.model, "vocab_size": 200, "mask_token_id": 199, "eos_token_id": 198,
                                  "pad_token_id": 198}}  # fmt: skip
    ended = command("-c", str(tiny.write(tmp_path / "run.yaml", values)))
    assert ended.status == [2, 2] and len(ended.errors) == 1
    assert "has 262 ids, the model's embedding only 200" in ended.errors[0]


def test_a_rank_that_fails_says_why_and_ends_all(command, config: Path, tmp_path: Path) -> None:
    ended = command("-c", str(config), trouble=(1, 4, "error"))
    assert ended.status == [2, 2]
    assert ended.errors == ["unmask: error: rank 1: data.jsonl:7: something is wrong with this row"]
    verify(tmp_path / "run" / "step_2")


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_bad_row_that_all_ranks_or_one_alone_meet_is_said_once_and_loses_nothing(
    command, config: Path, tmp_path: Path, rank: int | None
) -> None:
    ended = command("-c", str(config), bad_data=(rank, 4))
    newest = tmp_path / "run" / "step_3"
    assert ended.status == [2, 2]
    (said,) = ended.errors  # by whichever of them says it first
    where = "" if rank is None else f" (on rank {rank} alone)"
    assert said.removeprefix("unmask: error: ").removeprefix("rank 1: ") == (
        f"data.jsonl:7: something is wrong with this row{where}. "
        f"Step 3 is saved in {newest}: the same command goes on from there"
    )
    verify(newest)
    assert json.loads((newest / "state.json").read_text())["loader"]["cursor"] == 12
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (events[-1]["event"], events[-1]["reason"]) == ("stopped", "data")


def test_a_rank_that_is_killed_ends_all(command, config: Path) -> None:
    ended = command("-c", str(config), trouble=(1, 3, "SIGKILL"))
    assert ended.status == [1, None]
    assert len(ended.errors) == 1 and "another rank died" in ended.errors[0] and ended.said[1] == ""


def test_a_signal_to_any_rank_saves_once_and_ends_all(command, config: Path, tmp_path: Path) -> None:
    ended = command("-c", str(config), trouble=(1, 3, "SIGTERM"))
    assert ended.status == [0, 0] and ended.errors == []
    assert "SIGTERM after step 3" in ended.said[0]
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [2, 3]
    assert events[-1]["event"] == "end" and events[-1]["reason"] == "SIGTERM"
    verify(tmp_path / "run" / "step_3")


def test_a_rank_without_disk_stops_all_with_the_reason(command, config: Path, tmp_path: Path) -> None:
    ended = command("-c", str(config), "--step_scheduler.ckpt_every_steps", "3", trouble=(1, 2, "disk"))
    assert ended.status == [2, 2] and len(ended.errors) == 1
    assert (
        f"{tmp_path / 'run' / 'step_3'}: the checkpoint could not be saved (rank 1: {tmp_path / 'run'}/.step_3."
        in (ended.errors[0])
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.yaml", "metrics.jsonl"}


@pytest.mark.parametrize("status", [0, 2])
def test_processes_leave_the_process_group(run_ranks, start_ranks, tiny, tmp_path: Path, status: int) -> None:
    """When all went well and when it did not; one that cannot ends all the same, with its status."""
    for rank in range(2):  # other rates are refused once the ranks have met
        values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1, optimizer__lr=1e-3 * (1 + rank * status))
        tiny.write(tmp_path / f"run{rank}.yaml", values)
    words = ["train", "-c", str(tmp_path / "run{rank}.yaml")]
    assert run_ranks(2, "command_and_groups", words) == [(status, False)] * 2
    if status == 0:
        shutil.rmtree(tmp_path / "run")
    processes = start_ranks(tmp_path / "stuck", 2, "command_that_cannot_leave", words)
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [status, status]


def test_an_error_that_nobody_foresaw_is_one_line_and_a_traceback(command, config: Path, tmp_path: Path) -> None:
    ended = command("-c", str(config), trouble=(1, 3, "bug"))
    assert ended.status == [1, 1] and len(ended.errors) == 1
    (kept,) = (tmp_path / "run").glob("traceback-rank1-*.txt")
    assert ended.errors[0].startswith("unmask: error: rank 1: ZeroDivisionError: ") and str(kept) in ended.errors[0]
    assert "train_step" in kept.read_text()


def test_a_port_in_use(tiny, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-m", "unmask.train", "-c", str(path)],
            capture_output=True, text=True, env={**os.environ, **launcher}, timeout=90,
        )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("unmask: error:")]
    assert done.returncode == 2 and len(errors) == 1
    assert f"MASTER_PORT: port {port} of 127.0.0.1 is in use" in errors[0] and "Traceback" not in done.stderr


def test_an_unfinished_save_is_raised_on_every_rank() -> None:
    def fail() -> None:
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        from_first(ALONE, fail)
