"""Law: killed and resumed = never killed. The same losses, float for float, and the same bytes of weights."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unmask.models.manifest import MANIFEST, STATE
from unmask.report.metrics import read_metrics
from unmask.training.checkpoint import checkpoints, verify

ROOT = Path(__file__).parents[2]
STEPS = 60
Train = Callable[..., Any]

# Forks a process for each command line that it reads, so that torch is imported once: prints its id, and how it ended.
# `fatal` is for the moments that a random kill meets by chance, met on purpose: SIGKILL in the n-th call of a function.
SERVER = """
import json, os, signal, sys
import matplotlib.pyplot, torch._dynamo, unmask.assemble, unmask.data.loader, unmask.data.template_loading
import unmask.training.loop, unmask.training.run, unmask.training.saver, unmask.models.lora, peft
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from unmask.cli import main
from unmask.training import checkpoint

def fatal(name, left):
    function = getattr(checkpoint, name)
    def call(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    setattr(checkpoint, name, call)

for line in sys.stdin:
    words, moment = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if moment:
            fatal(*moment)
        sys.exit(main(words))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs `unmask train -c PATH` in processes of their own, one at a time."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER], env=environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
            )  # fmt: skip

    def start(self, path: Path, moment: tuple[str, int] | None = None) -> int:
        """Return the id of a process that trains, and is killed in a call of a function if a moment names one."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([["train", "-c", str(path)], moment]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline() or self.failed())

    def ended(self) -> int:
        """Wait for the process that was started last; return its exit status, below 0 for a signal."""
        assert self.process.stdout
        return int(self.process.stdout.readline() or self.failed())

    def kill_at(self, path: Path, root: Path, step: int) -> int:
        """Train, end it with SIGKILL after some step, and return its exit status."""
        child = self.start(path)
        wait_for_step(lambda: self.alive(child), root, step)
        with contextlib.suppress(ProcessLookupError):  # a run near its end may have reached it
            os.kill(child, signal.SIGKILL)
        return self.ended()

    def alive(self, child: int) -> bool:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return False
        return True

    def failed(self) -> str:
        raise AssertionError(self.errors.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "errors")
    yield running
    running.process.communicate()


def config(tiny, root: Path, **changes: object) -> dict:
    fixed = {
        "step_scheduler__max_steps": STEPS,
        "step_scheduler__ckpt_every_steps": 7,
        "lr_scheduler__lr_decay_style": "cosine",
        "lr_scheduler__lr_warmup_steps": 5,
        "dllm__time_sampling": "stratified",
    }
    return tiny.config(root, **{**fixed, **changes})


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def wait_for_step(alive: Callable[[], bool], root: Path, step: int) -> None:
    log = root / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b'"event": "train"') < step:
        assert alive(), f"the run ended before step {step}"
        time.sleep(0.002)


def losses(root: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_metrics(root / "metrics.jsonl") if event["event"] == "train"}


def weights(root: Path) -> bytes:
    return (root / "latest" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def reference(tiny, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    return train_tiny(config(tiny, tmp_path_factory.mktemp("whole"))).root


def assert_same_as(reference: Path, root: Path) -> None:
    assert losses(root) == losses(reference)
    assert list(losses(root)) == list(range(1, STEPS + 1))
    assert weights(root) == weights(reference)
    assert not list(root.glob(".*.part"))


def test_killed_at_some_step(tiny, server: Server, train_tiny: Train, tmp_path: Path, reference: Path) -> None:
    values = config(tiny, tmp_path / "run")
    assert server.kill_at(tiny.write(tmp_path / "run.yaml", values), tmp_path / "run", 24) == -signal.SIGKILL
    resumed = train_tiny(values)
    assert "resuming from" in resumed.output
    assert_same_as(reference, tmp_path / "run")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random DiffusionGemma in the released layout, made as the guide makes one."""
    folder = tmp_path_factory.mktemp("gemma") / "gemma"
    script = runpy.run_path(str(ROOT / "examples" / "tiny_diffusion_gemma.py"))
    script["TEXT"].update(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, head_dim=8, global_head_dim=16
    )
    rows = ROOT / "tests" / "fixtures" / "gsm8k_chat_64.jsonl"
    script["make"](str(rows), str(folder), vocab_size=400, canvas_length=16)
    return folder


def changes_of(mode: str, base: Path, gemma: Path) -> dict[str, Any]:
    if mode == "full":
        return {}
    if mode == "adapter":
        adapter = {"r": 4, "use_dora": True, "modules_to_save": ["*norm"]}
        return {"model": {"pretrained_model_name_or_path": str(base)}, "peft": adapter}
    return {
        "model": {"pretrained_model_name_or_path": str(gemma)},
        "dllm": {"mode": "block_diffusion"},
        "dataset__tokenizer": str(gemma),
        "dataset__chat_template": "diffusion_gemma",
    }


def state(root: Path) -> dict[str, bytes]:
    """Return the last checkpoint's weights or adapter, and the optimizer's."""
    return {file.name: file.read_bytes() for file in (root / "latest").rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["full", "adapter", "DiffusionGemma"])
def test_killed_twenty_times_in_one_run(
    mode: str, tiny, server: Server, tmp_path: Path, tiny_base: Path, gemma: Path
) -> None:
    """Sixty kills in three modes: every checkpoint stays whole, and the end is that of a run that was never killed."""
    changes = changes_of(mode, tiny_base, gemma)
    whole, values = (config(tiny, tmp_path / name, **changes) for name in ("whole", "run"))
    server.start(tiny.write(tmp_path / "whole.yaml", whole))
    assert server.ended() == 0
    path = tiny.write(tmp_path / "run.yaml", values)
    kills = [server.kill_at(path, tmp_path / "run", step) for step in range(1, STEPS - 1, 3)]
    assert kills == [-signal.SIGKILL] * 20
    for folder in checkpoints(tmp_path / "run"):
        verify(folder)
    server.start(path)
    assert server.ended() == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*.part"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "calls"), [("crc32", 0), ("crc32", 12), ("_to_disk", 0), ("_to_disk", 15), ("_point_latest", 1)]
)
def test_killed_inside_a_save(
    tiny, server: Server, train_tiny: Train, tmp_path: Path, reference: Path, name: str, calls: int
) -> None:
    values = config(tiny, tmp_path / "run")
    server.start(tiny.write(tmp_path / "run.yaml", values), (name, calls))
    assert server.ended() == -signal.SIGKILL
    for folder in checkpoints(tmp_path / "run"):
        verify(folder)
    if (tmp_path / "run" / "latest").is_symlink():
        verify(tmp_path / "run" / "latest")
    train_tiny(values)
    assert_same_as(reference, tmp_path / "run")


def test_a_signal_to_the_process_group_saves_and_ends_cleanly(
    tiny, train_tiny: Train, tmp_path: Path, reference: Path
) -> None:
    """As Ctrl-C and batch systems do: the loader's worker gets it too."""
    values = config(tiny, tmp_path / "run")
    path = tiny.write(tmp_path / "run.yaml", {**values, "dataloader": {"num_workers": 1}})
    words = [sys.executable, "-m", "unmask", "train", "-c", str(path)]
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_step(lambda: process.poll() is None, tmp_path / "run", 10)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    stopped = max(losses(tmp_path / "run"))
    assert stopped < STEPS and f"SIGTERM after step {stopped}; run directory: " in out
    assert os.readlink(tmp_path / "run" / "latest") == f"step_{stopped}"
    verify(tmp_path / "run" / "latest")
    train_tiny(values)
    assert_same_as(reference, tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataloader__group_by_length": True, "dataloader__num_workers": 2},
        {"dllm__supervise_padding": True, "step_scheduler__local_batch_size": 4},
        {"peft": {"r": 4, "lora_dropout": 0.2, "use_dora": True, "use_rslora": True, "modules_to_save": ["*norm"]}},
        {"peft": {"r": 4, "load_in_4bit": True}},
        {"model__torch_dtype": "bfloat16"},
        {"model__torch_dtype": "bfloat16", "optimizer__stochastic_rounding": True},
        {
            "model__torch_dtype": "bfloat16",
            "peft": {"r": 4, "lora_dropout": 0.2, "modules_to_save": ["*.wte", "*norm"]},
        },
    ],
    ids=[
        "plain",
        "workers and grouping",
        "supervised padding",
        "adapter",
        "4-bit base",
        "bf16",
        "bf16 rounded",
        "bf16 and an adapter",
    ],
)
def test_stopped_twice_and_resumed_twice(tiny, tiny_base, train_tiny: Train, tmp_path: Path, changes: dict) -> None:
    if "peft" in changes:
        changes = {"model": {"pretrained_model_name_or_path": str(tiny_base)}, **changes}
    whole = config(tiny, tmp_path / "whole", step_scheduler__max_steps=20, **{**changes, "dataloader__num_workers": 0})
    parts = config(tiny, tmp_path / "parts", step_scheduler__max_steps=20, **changes)
    train_tiny(whole)
    validation = {"step_scheduler": {**parts["step_scheduler"], "val_every_steps": 6}}
    stop = {"extra_validators": lambda _: [lambda _: signal.raise_signal(signal.SIGINT) or {}]}
    for expected in (6,) if "dataloader__num_workers" in changes else (6, 12):  # workers take seconds to start
        run = train_tiny({**parts, **validation, "validation_dataset": tiny.validation(max_samples=1)}, **stop)
        assert (run.outcome.reason, run.outcome.step) == ("SIGINT", expected)
    run = train_tiny(parts)
    assert (run.outcome.reason, run.outcome.step) == ("finished", 20)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    name = "adapter_model.safetensors" if "peft" in changes else "model.safetensors"
    final = [(tmp_path / part / "latest" / name).read_bytes() for part in ("whole", "parts")]
    assert final[0] == final[1]


def test_a_finished_run_started_again_changes_nothing(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = config(tiny, tmp_path, step_scheduler__max_steps=3)
    first = train_tiny(values)
    stamp = (tmp_path / "step_3" / "model.safetensors").stat().st_mtime_ns
    again = train_tiny(values)
    assert again.events == first.events
    assert again.outcome.reason == "already finished" and "already finished" in again.output
    assert (tmp_path / "step_3" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_longer_run_goes_on_from_a_finished_one(tiny, train_tiny: Train, tmp_path: Path) -> None:
    whole = train_tiny(tiny.config(tmp_path / "whole", step_scheduler__max_steps=6))
    train_tiny(tiny.config(tmp_path / "parts", step_scheduler__max_steps=4))
    parts = train_tiny(tiny.config(tmp_path / "parts", step_scheduler__max_steps=6))
    assert parts.losses == whole.losses  # the rate is constant, so the length does not matter


def test_a_torn_checkpoint_is_named_and_the_previous_one_used(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2)
    whole = train_tiny(values)
    for step in (4, 6):
        path = tmp_path / f"step_{step}" / "optimizer" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    again = train_tiny(values)
    assert "refused: step_6 is torn: optimizer/model.safetensors" in again.output
    assert "refused: step_4 is torn: optimizer/model.safetensors" in again.output
    assert "step_2 after step 2 of 6" in again.output
    assert again.losses == whole.losses
    for folder in checkpoints(tmp_path):
        verify(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__config__d_model": 64}, "its model is"),
        ({"model__torch_dtype": "bfloat16"}, "its torch_dtype is"),
        ({"seed": 1}, "its seed is"),
        ({"dataset__path_or_dataset_id": "valid.jsonl"}, "no longer the same (24 rows then, 6 now)"),
        ({"step_scheduler__global_batch_size": 2}, "its global_batch_size is"),
        ({"dataset__answers": "all"}, "its answers is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tiny, train_tiny: Train, tmp_path: Path, changes: dict, named: str):
    from unmask.errors import CheckpointError

    root = tmp_path / "run"
    train_tiny(tiny.config(root, step_scheduler__max_steps=1))
    before = weights(root)
    changes = {k: str(tiny.folder / v) if v == "valid.jsonl" else v for k, v in changes.items()}
    with pytest.raises(CheckpointError) as caught:
        train_tiny(tiny.config(root, **changes))
    assert "step_1 is foreign" in str(caught.value) and named in str(caught.value)
    assert weights(root) == before


def test_a_torn_last_line_of_the_log_is_cut(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2)
    whole = train_tiny({**values, "step_scheduler": {**values["step_scheduler"], "max_steps": 4}})
    later = {"event": "train", "step": 5, "loss": 99.0}
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(later) + "\n" + '{"event": "train", "st')
    again = train_tiny(values)
    assert list(again.losses) == [1, 2, 3, 4, 5, 6] and again.losses[5] != 99.0
    assert {step: again.losses[step] for step in whole.losses} == whole.losses


def test_a_damaged_line_of_the_log_does_not_block_a_resume(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2)
    train_tiny({**values, "step_scheduler": {**values["step_scheduler"], "max_steps": 4}})
    log = tmp_path / "metrics.jsonl"
    lines = log.read_bytes().splitlines()
    lines[1:1] = [b'{"event": "tr\xff', b'{"event": "train", "step": "1"}', b"[" * 100_000]
    log.write_bytes(b"\n".join(lines) + b"\n")
    again = train_tiny(values)
    assert list(again.losses) == [1, 2, 3, 4, 5, 6]
    assert f"{log}: 3 damaged lines were removed, the first of them line 2" in again.output


def test_a_checkpoint_of_the_whole_model_is_refused_by_a_run_of_an_adapter(tiny, tiny_base, train_tiny, tmp_path):
    from unmask.errors import CheckpointError

    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    train_tiny(values)
    with pytest.raises(CheckpointError, match="step_1 is foreign: its peft is null"):
        train_tiny({**values, "peft": {"r": 2}})


def test_an_adapter_is_not_resumed_on_another_base(tiny, tiny_base: Path, train_tiny: Train, tmp_path: Path) -> None:
    from unmask.errors import CheckpointError

    moved, other = shutil.copytree(tiny_base, tmp_path / "moved"), shutil.copytree(tiny_base, tmp_path / "other")
    (other / MANIFEST).unlink()  # with them the change would be damage
    (other / STATE).unlink()
    file = other / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1, peft={"r": 2})
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    train_tiny(values)
    with pytest.raises(CheckpointError, match="step_1 is foreign: its base is"):
        train_tiny({**values, "model": {"pretrained_model_name_or_path": str(other)}})
    again = train_tiny({**values, "model": {"pretrained_model_name_or_path": str(moved)}})
    assert again.outcome.reason == "already finished"


def test_what_changed_since_the_checkpoint_is_said_and_recorded(tiny, train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(tiny.config(tmp_path, step_scheduler__max_steps=2))
    changes = {"dllm__eps": 0.1, "dataset__seq_length": 64, "optimizer__lr": 1e-4}
    again = train_tiny(tiny.config(tmp_path, step_scheduler__max_steps=4, **changes))
    first, second = [event["changed"] for event in again.events if event["event"] == "run"]
    assert first == []
    assert second == [
        "dataset.seq_length 96 → 64",
        "step_scheduler.max_steps 2 → 4",
        "dllm.eps 0.001 → 0.1",
        "optimizer.lr 0.003 → 0.0001",
    ]
    assert [line for line in again.output.splitlines() if "changed since" in line] == [
        f"changed since step 2: {line}" for line in second
    ]


def test_a_resume_cuts_what_later_steps_left_out(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2, dataset__truncation=False)
    whole = train_tiny(values)
    assert [event["event"] for event in whole.events][-2:] == ["data", "end"]
    path = tmp_path / "step_6" / "optimizer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = train_tiny(values)
    assert [event["step"] for event in again.events if event["event"] == "data"] == [6]
