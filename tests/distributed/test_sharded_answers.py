"""A model that ranks share answers as the whole model does, for any family, adapter and kind of checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import main
from unmask.distributed import launch

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`

ADAPTER = {"r": 4, "target_modules": ["*.q_proj", "*.ff_out"]}


@pytest.fixture(scope="module")
def gemma_base(tiny, gemma_values: Callable[..., dict], train_tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of a small DiffusionGemma."""
    text = {"vocab_size": 264, "num_hidden_layers": 2, "pad_token_id": 257, "eos_token_id": 257,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    values = tiny.config(
        tmp_path_factory.mktemp("gemma"), step_scheduler__max_steps=1, step_scheduler__local_batch_size=1,
        dllm={"mode": "block_diffusion"},
    )  # fmt: skip
    values["model"] = {"config": gemma_values(canvas_length=8, **text)}
    return train_tiny(values).root / "step_1"


@pytest.fixture(scope="module")
def adapter(tiny, tiny_base: Path, train_tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny.config(tmp_path_factory.mktemp("adapter"), step_scheduler__max_steps=1, peft=ADAPTER)
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    return train_tiny(values).root / "step_1"


@pytest.fixture
def answers(run_ranks, tmp_path: Path, device: str) -> Callable[..., list[list[dict[str, Any]]]]:
    """Return a function that answers on one process and, sharded, on two; it returns both files' records."""

    def run(checkpoint: Path, *more: str) -> list[list[dict[str, Any]]]:
        prompts = [word for text in ("1 plus 1?", "so?", "20 plus 6?") for word in ("--prompt", text)]
        flags = ["--max_new_tokens", "16", "--batch_size", "1", "--device", device, *more]
        words = ["generate", "--checkpoint", str(checkpoint), *prompts, *flags, "--output"]
        assert main([*words, str(tmp_path / "one.jsonl")]) == 0
        assert run_ranks(2, "command", [*words, str(tmp_path / "two.jsonl"), "--shard"]) == [0, 0]
        found = []
        for name in ("one.jsonl", "two.jsonl"):
            records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
            found.append([{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records])
        return found

    return run


def test_a_shared_gemma_answers_as_a_whole_one(answers, gemma_base: Path) -> None:
    # A canvas may stop early, so answers take different numbers of calls, of the encoder and of the decoder.
    one, two = answers(gemma_base, "--steps", "6", "--dtype", "float32")
    assert one == two and len(one) == 3


@pytest.mark.slow
def test_a_shared_network_with_an_adapter(answers, tiny_base: Path, adapter: Path) -> None:
    one, two = answers(tiny_base, "--adapter", str(adapter), "--block_size", "8", "--threshold", "0.03")
    assert one == two and len({record["nfe"] for record in one}) > 1


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_shared_again(tiny, answers, run_ranks, tmp_path: Path) -> None:
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1, checkpoint__save_consolidated=False)
    run_ranks(2, "train", values)
    assert not (tmp_path / "run" / "latest" / "model.safetensors").exists()
    # A cached call runs the blocks over a window of positions, by another method than the whole one.
    one, two = answers(tmp_path / "run", "--steps", "4", "--block_size", "8", "--cache", "dual")
    assert one == two


def test_one_process_has_nobody_to_share_with(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", str(tiny_base), "--prompt", "so?", "--device", "cpu", "--shard"]) == 2
    said = capsys.readouterr().err
    assert "--shard" in said and "--nproc-per-node" in said and len(said.splitlines()) == 1


def test_the_command_is_started_again_in_every_process(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple] = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: started.append(arguments) or 7)
    words = ["generate", "--checkpoint", str(tiny_base), "--prompt", "so?"]
    assert main([*words, "--nproc-per-node", "2", "--device", "cpu"]) == 7
    assert main([*words, "--nproc_per_node=3", "--shard"]) == 7
    assert started == [("unmask", [*words, "--device", "cpu"], 2), ("unmask", [*words, "--shard"], 3)]
    monkeypatch.undo()
    assert main([*words, "--nproc-per-node", "0"]) == 2
    assert "--nproc-per-node: must be at least 1, got 0" in capsys.readouterr().err
