"""What a run logs, and how it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.errors import CheckpointError, ConfigError, DataError, TrainingError, is_out_of_memory
from unmask.training import checkpoint as checkpoint_module

Train = Callable[..., Any]
FIELDS = {
    "event", "step", "loss", "mdlm_loss", "grad_norm", "lr", "tokens", "supervised_tokens", "tokens_per_second",
    "tokens_per_second_per_device", "mfu", "data_seconds", "memory_gib", "time",
}  # fmt: skip


def test_a_run_directory_holds_what_the_design_says(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = tiny.config(
        tmp_path, step_scheduler__ckpt_every_steps=2, step_scheduler__val_every_steps=4,
        validation_dataset=tiny.validation(),
    )  # fmt: skip
    run = train_tiny(values, draw=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml", "metrics.jsonl", "loss.png", "step_2", "step_4", "step_6", "latest",
    }  # fmt: skip
    train = [event for event in run.events if event["event"] == "train"]
    assert [event["step"] for event in train] == [1, 2, 3, 4, 5, 6]
    assert all(set(event) == FIELDS for event in train)
    assert all(math.isfinite(event["loss"]) and event["loss"] == event["mdlm_loss"] for event in train)
    validation = [event for event in run.events if event["event"] == "validation"]
    assert [event["step"] for event in validation] == [4, 6]
    assert all({"loss", "mdlm_loss"} <= set(event) for event in validation)
    assert (tmp_path / "config.yaml").read_text() == (tmp_path / "step_6" / "config.yaml").read_text()


def test_every_checkpoint_but_the_recent_ones_is_removed(tiny, train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(tiny.config(tmp_path, step_scheduler__ckpt_every_steps=1, checkpoint__max_recent_checkpoints=2))
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_5", "step_6"}


def test_without_checkpoints_there_are_none(tiny, train_tiny: Train, tmp_path: Path) -> None:
    values = tiny.config(tmp_path, checkpoint__enabled=False, step_scheduler__ckpt_every_steps=1)
    run = train_tiny(values)
    assert run.outcome.checkpoint is None and not list(tmp_path.glob("step_*"))


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the loss of step `at` (two micro-batches a step) not a number."""
    from unmask.objectives.mdlm import MDLM

    original, calls = MDLM.loss, 0

    def loss(self, model, noisy, counts):
        nonlocal calls
        calls += 1
        found = original(self, model, noisy, counts)
        if calls == 2 * at:
            found.terms["mdlm"].sum.fill_(float("nan"))
        return found

    monkeypatch.setattr(MDLM, "loss", loss)


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2)
    poison(monkeypatch, at=4)
    with pytest.raises(TrainingError) as caught:
        train_tiny(values)
    said = str(caught.value)
    assert caught.value.exit_status == 1 and "\n" not in said
    assert said.startswith("step 4: the loss (nan)") and str(tmp_path / "step_2") in said
    assert said.count("train.jsonl:") == 4  # every row of the global batch, by file and line
    monkeypatch.undo()
    assert list(train_tiny(values).losses) == [1, 2, 3, 4, 5, 6]


def test_a_step_that_is_not_finite_leaves_model_and_optimizer_alone(tiny) -> None:
    from unmask.config import config_from_mapping
    from unmask.config.training import OptimizerConfig
    from unmask.distributed.runtime import Runtime
    from unmask.models.loading import build_model
    from unmask.parts import build_parts
    from unmask.prepare import prepare
    from unmask.rng import NoiseStream
    from unmask.training.optim import build_optimizer
    from unmask.training.step import train_step

    prepared = prepare(config_from_mapping(tiny.config(Path("unused"))))
    parts = build_parts(prepared)
    model = build_model(prepared.plan, "float32")
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("inf")
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(OptimizerConfig(), model)
    batches = next(iter(parts.loader))
    with torch.no_grad():
        next(model.parameters())[int(batches[0].input_ids_BL[0, 0])] = float("inf")
        before[0][int(batches[0].input_ids_BL[0, 0])] = float("inf")
    runtime = Runtime(torch.device("cpu"), None)
    result = train_step(model, parts.objective, batches, NoiseStream(1), optimizer, runtime, 1.0)
    assert not result.finite and not optimizer.state
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_a_disk_that_fills_up_while_saving(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unmask.training.saver as saver

    values = tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2)

    original = saver.save_weights

    def full(tensors: Any, folder: Path) -> None:
        if (tmp_path / "step_2").exists():
            raise OSError(28, "No space left on device")
        original(tensors, folder)

    monkeypatch.setattr(saver, "save_weights", full)
    with pytest.raises(CheckpointError) as caught:
        train_tiny(values)
    assert str(tmp_path / "step_4") in str(caught.value) and "No space left on device" in str(caught.value)
    assert [path.name for path in checkpoint_module.checkpoints(tmp_path)] == ["step_2"]
    checkpoint_module.verify(tmp_path / "latest")
    assert not list(tmp_path.glob(".*"))


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    from unmask.report.metrics import MetricsLog

    log = MetricsLog(tmp_path / "metrics.jsonl")

    class Full:
        def write(self, _: str) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    log._file.close()
    log._file = Full()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        log.write("train", step=1)


def test_a_full_disk_is_reported_once_and_closes_everything() -> None:
    from unmask.report.metrics import MetricsLog

    closed = []
    log = MetricsLog(Path("/dev/full"), closers=[lambda: closed.append(True)])
    with pytest.raises(DataError, match="cannot be written .*No space left"):
        log.write("train", step=1)
    log.close()
    assert closed == [True]


CPU_OUT_OF_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "900000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU_OUT_OF_MEMORY)]
)
def test_memory_that_runs_out_names_the_step_and_what_to_lower(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    fail_at_third_step(monkeypatch, error)
    with pytest.raises(TrainingError) as caught:
        train_tiny(tiny.config(tmp_path, step_scheduler__ckpt_every_steps=2))
    said = str(caught.value)
    assert said.startswith("step 3: memory ran out on cpu") and "\n" not in said
    for named in ("local_batch_size", "distributed.activation_checkpointing", "dataset.seq_length", "step_2"):
        assert named in said
    assert caught.value.exit_status == 1 and caught.value.__cause__ is error


def test_what_the_cpu_says_when_memory_runs_out_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_another_error_of_a_step_is_not_taken_for_memory(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_third_step(monkeypatch, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_tiny(tiny.config(tmp_path))


def fail_at_third_step(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import unmask.training.loop as loop

    original, calls = loop.train_step, 0

    def step(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize("after", [0, 2])
def test_workers_that_a_signal_ended_too_do_not_lose_the_run(
    tiny, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    import signal

    from unmask.data.loader import TrainLoader

    original = TrainLoader.__iter__

    def steps(self: TrainLoader, stopped: bool = True) -> Any:
        stream = original(self)
        for _ in range(after):
            yield next(stream)
        if stopped:
            signal.raise_signal(signal.SIGTERM)
        raise DataError("a worker process died")

    values = tiny.config(tmp_path)
    monkeypatch.setattr(TrainLoader, "__iter__", steps)
    run = train_tiny(values)
    assert (run.outcome.reason, run.outcome.step) == ("SIGTERM", after)
    assert [path.name for path in tmp_path.glob("step_*")] == ([f"step_{after}"] if after else [])
    monkeypatch.setattr(TrainLoader, "__iter__", lambda self: steps(self, stopped=False))
    with pytest.raises(DataError, match="worker process died"):
        train_tiny(values)
    monkeypatch.undo()
    assert list(train_tiny(values).losses) == [1, 2, 3, 4, 5, 6]


def test_a_mask_that_text_can_contain_is_refused(tiny, train_tiny: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mask_token_id 65 for ordinary text .*add a mask token"):
        train_tiny(tiny.config(tmp_path, model__config={**tiny.model, "mask_token_id": 65}))
    train_tiny(  # an id that the tokenizer does not have
        tiny.config(tmp_path, model__config={**tiny.model, "mask_token_id": 263}, step_scheduler__max_steps=1)
    )


def test_rows_left_out_of_training_and_validation_are_named_and_recorded(tiny, train_tiny: Train, tmp_path: Path):
    def chat(answer: str) -> str:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns}) + "\n"

    path = tmp_path / "rows.jsonl"
    path.write_text(chat("a") * 2 + chat("b" * 200) + '{"broken\n' + chat("c") * 3)
    rows = {"path_or_dataset_id": str(path), "truncation": False, "on_malformed": "skip", "seq_length": 96}
    values = tiny.config(tmp_path / "run", validation_dataset=rows, step_scheduler__max_steps=2)
    values["dataset"].update(rows)
    run = train_tiny(values)
    event = next(event for event in run.events if event["event"] == "run")
    reason = "longer than seq_length, and truncation is off"
    assert (event["rows"], event["skipped_rows"]) == (6, 1)
    assert (event["validation_rows"], event["validation_skipped_rows"]) == (6, 1)
    assert event["validation_dropped_rows"] == {reason: 1}
    assert f"validation: skipped row: {path}:4" in run.output
    assert "validation: skipped 1 malformed rows" in run.output
    assert f"validation: left out 1 rows: {reason} (first: {path}:3)" in run.output
    assert f"\nleft out 1 rows: {reason} (first: {path}:3)" in run.output
    data = next(event for event in run.events if event["event"] == "data")
    assert (data["step"], data["dropped_rows"]) == (2, {reason: 1})


def test_what_rows_say_and_nothing_learns_is_said_once_with_its_count(tiny, train_tiny: Train, tmp_path: Path):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a", "reasoning": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": n, "messages": turns}) + "\n" for n in range(8)))
    values = tiny.config(
        tmp_path / "run", validation_dataset=tiny.validation(path_or_dataset_id=str(path)),
        dataset__path_or_dataset_id=str(path), step_scheduler__max_steps=4,
    )  # fmt: skip
    output = train_tiny(values).output
    for note in ("the key 'id', which nothing reads", "reasoning that the chat template does not show"):
        assert f"\n8 of the rows read have {note}" in output and output.count(note) == 2
        assert f"validation: 8 of the rows read have {note}" in output
