"""DiffusionGemma from the two example configurations, scaled down by overrides: train, sample, export, load again."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import unmask
from unmask.cli import main
from unmask.report.metrics import read_metrics

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ROWS = ROOT / "tests" / "fixtures" / "gsm8k_chat_64.jsonl"
STEPS, ADAPTER_STEPS = 8, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the released layout, made as the guide makes one, but smaller."""
    folder = tmp_path_factory.mktemp("tiny") / "gemma"
    script = runpy.run_path(str(EXAMPLES / "tiny_diffusion_gemma.py"))
    script["TEXT"].update(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, head_dim=8, global_head_dim=16
    )
    script["make"](str(ROWS), str(folder), vocab_size=400, canvas_length=16)
    return folder


def train(kind: str, checkpoint: Path, root: Path, *more: str) -> Path:
    words = ["train", "-c", str(EXAMPLES / "dllm_sft" / f"diffusion_gemma_{kind}.yaml")]
    overrides = {
        "model.pretrained_model_name_or_path": checkpoint,
        "dataset.path_or_dataset_id": ROWS,
        "dataset.tokenizer": checkpoint,
        "dataset.seq_length": 192,
        "validation_dataset.path_or_dataset_id": ROWS,
        "validation_dataset.seq_length": 192,
        "validation_dataset.max_samples": 16,
        "validation_dataset.chat_template": "diffusion_gemma",
        "step_scheduler.val_at_start": "true",
        "dllm.block_size": 16,
        "dllm.vocab_size": 400,
        "distributed.ep_size": 1,
        "distributed.device": "cpu",
        "step_scheduler.local_batch_size": 8,
        "step_scheduler.num_epochs": 4,
        "step_scheduler.max_steps": STEPS,
        "step_scheduler.ckpt_every_steps": 4,
        "lr_scheduler.lr_warmup_steps": 1,
        "optimizer.lr": 0.01,
        "checkpoint.checkpoint_dir": root,
    }
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    assert main([*words, *more]) == 0
    return root


@pytest.fixture(scope="module")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("sft", checkpoint, tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def lora(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Over the trained model: an untrained embedding, which is the head too, leaves an adapter little to gain. In fp32:
    # a CPU without bf16 hardware makes small bf16 products slowly.
    root = tmp_path_factory.mktemp("runs") / "lora"
    more = {"step_scheduler.max_steps": ADAPTER_STEPS, "distributed.autocast_dtype": "float32"}
    return train("lora", full / "latest", root, *(word for key in more for word in (f"--{key}", str(more[key]))))


@pytest.mark.parametrize(("kind", "steps"), [("full", STEPS), ("lora", ADAPTER_STEPS)])
def test_both_losses_fall(kind: str, steps: int, request: pytest.FixtureRequest) -> None:
    """On fixed noise: over so few steps the training losses differ more by their levels than by what was learned."""
    events = read_metrics(request.getfixturevalue(kind) / "metrics.jsonl")
    assert sum(event["event"] == "train" for event in events) == steps
    before, after = (event for event in events if event["event"] == "validation")
    for name in ("loss", "diffusion_loss", "encoder_loss"):
        assert after[name] < before[name] - 0.002, name


def test_full_training_leaves_routers_and_vision_bit_identical_and_changes_the_rest(
    checkpoint: Path, full: Path
) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, full / "latest"))
    assert before.keys() == after.keys()
    frozen = [key for key in before if "router.proj" in key or "router.scale" in key or "vision" in key]
    scalars = [key for key in before if "layer_scalar" in key]
    assert len(frozen) > 8 and len(scalars) == 8
    for key in before:
        assert torch.equal(before[key], after[key]) == (key in frozen or key in scalars), key


def test_an_adapter_run_saves_the_adapter_alone(lora: Path) -> None:
    names = {path.name for path in (lora / "latest").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


@pytest.mark.parametrize("base", [{"model.torch_dtype": "bfloat16"}, {"peft.load_in_4bit": "true"}], ids=str)
def test_an_adapter_of_a_small_base_trains_and_goes_on(base: dict[str, str], full: Path, tmp_path: Path) -> None:
    """Experts among its targets: the base in bf16 or in 4 bits, the adapter in fp32."""
    words = {
        "distributed.autocast_dtype": "float32", "step_scheduler.max_steps": 2, "step_scheduler.ckpt_every_steps": 1,
        "peft.target_parameters": '["*experts.gate_up_proj", "*experts.down_proj"]', **base,
    }  # fmt: skip
    if "peft.load_in_4bit" in base:
        del words["peft.target_parameters"]
    flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train("lora", full / "latest", whole, *flags)
    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "step_2")
    (cut / "latest").unlink()
    (cut / "latest").symlink_to("step_1")
    train("lora", full / "latest", cut, *flags)
    first, second = (load_file(root / "latest" / "adapter_model.safetensors") for root in (whole, cut))
    assert all(value.dtype == torch.float32 for value in first.values())
    assert any(value.any() for name, value in first.items() if "lora_B" in name)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def answers(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    path = tmp_path / "answers.jsonl"
    prompts = ["--prompt", "How many apples?", "--prompt", "What is 2 + 2, and how did you find out?"]
    assert main(["generate", *prompts, "--max_new_tokens", "20", "--steps", "4", "--output", str(path), *words]) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()  # a file that is there is not replaced
    return found


def test_the_family_picks_its_own_sampler_and_the_adapter_changes_the_answer(
    checkpoint: Path, full: Path, lora: Path, tmp_path: Path
) -> None:
    bare = answers(tmp_path, "--checkpoint", str(checkpoint))
    trained = answers(tmp_path, "--checkpoint", str(full))
    adapted = answers(tmp_path, "--checkpoint", str(full), "--adapter", str(lora))
    for records in (bare, trained, adapted):
        assert all(len(record["token_ids"]) <= 20 for record in records)
    ids = [[record["token_ids"] for record in records] for records in (bare, trained, adapted)]
    assert ids[0] != ids[1] != ids[2]
    again = answers(tmp_path, "--checkpoint", str(full), "--adapter", str(lora))
    assert [record["token_ids"] for record in again] == ids[2]


def ours(folder: Path, adapter: Path | None, prompt: Tensor, canvas: Tensor) -> Tensor:
    model: Any = unmask.load_model(str(folder), adapter=None if adapter is None else str(adapter))
    with torch.no_grad():
        return model.logits(model.decode(canvas, model.encode(prompt)))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_export_computes_the_same_in_transformers(
    kind: str, full: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    root = request.getfixturevalue(kind)
    source = ["--checkpoint", str(root)] if kind == "full" else ["--checkpoint", str(full), "--adapter", str(root)]
    assert main(["export", *source, "--output", str(tmp_path / "plain")]) == 0
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "plain", output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.manual_seed(0)
    prompt, canvas = torch.randint(8, 400, (2, 21)), torch.randint(8, 400, (2, 16))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=prompt, decoder_input_ids=canvas).logits
    torch.testing.assert_close(ours(tmp_path / "plain", None, prompt, canvas), expected, atol=1e-4, rtol=1e-4)
    folder, adapter = (root, None) if kind == "full" else (full, root)
    torch.testing.assert_close(ours(folder, adapter, prompt, canvas), expected, atol=1e-4, rtol=1e-4)
    assert "<|turn>model" in AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template


def test_a_run_goes_on_exactly_where_it_stopped(checkpoint: Path, full: Path, tmp_path: Path) -> None:
    root = shutil.copytree(full, tmp_path / "run", symlinks=True)
    shutil.rmtree(root / f"step_{STEPS}")
    train("sft", checkpoint, root)
    assert (root / f"step_{STEPS}").is_dir()
    losses = [
        [event["loss"] for event in read_metrics(run / "metrics.jsonl") if event["event"] == "train"]
        for run in (full, root)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_router_cannot_be_unfrozen_under_an_adapter(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "-c", str(EXAMPLES / "dllm_sft" / "diffusion_gemma_lora.yaml"), "--distributed.ep_size", "1"]
    words += ["--model.pretrained_model_name_or_path", str(checkpoint), "--dllm.freeze_router", "false"]
    assert main([*words, "--checkpoint.checkpoint_dir", str(tmp_path / "run")]) == 2
    assert "dllm.freeze_router: false has no effect with peft" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
