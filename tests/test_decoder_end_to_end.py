"""Families on the decoder trunk through the whole house: trained, adapted, saved, exported, sampled and scored."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import unmask
from unmask.batch import Batch
from unmask.cli import main
from unmask.objectives.mdlm import MDLM
from unmask.training.export import export

MODEL = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "rope_theta": 1000.0, "mask_token_id": 261,
    "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
SHIFTED = {"model_type": "Dream", **MODEL}
TIED = {
    "model_type": "a2d-qwen3", **MODEL, "head_dim": 16, "tie_word_embeddings": True, "attention": "bidirectional",
}  # fmt: skip


@pytest.fixture(scope="module", params=[SHIFTED, TIED], ids=["shifted", "tied"])
def run(
    request: pytest.FixtureRequest, tiny: Any, train_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run directory of six steps with mdlm."""
    folder = tmp_path_factory.mktemp("decoder") / "run"
    validated = {"validation_dataset": tiny.validation(), "step_scheduler__val_every_steps": 3}
    done = train_tiny(tiny.config(folder, model__config=request.param, optimizer__lr=1e-2, **validated))
    assert len(done.losses) == 6 and done.losses[6] < done.losses[1]
    return folder


def test_it_is_exported_and_loads_here_and_in_transformers(run: Path, tmp_path: Path) -> None:
    model: Any = unmask.load_model(str(run))
    assert export(str(run), tmp_path / "out") == []
    again: Any = unmask.load_model(str(tmp_path / "out"))
    assert again.config == model.config
    for (key, one), (other_key, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(one, other)
    unmask.register()
    from transformers import AutoModelForMaskedLM

    theirs: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.logits(model.model(tokens)))
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("attention") in (None, "bidirectional")


def test_an_adapter_trains_and_merges(run: Path, tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    base = {"pretrained_model_name_or_path": str(run)}
    done = train_tiny(tiny.config(tmp_path / "lora", model=base, peft={"r": 2}))
    assert len(done.losses) == 6
    adapted: Any = unmask.load_model(str(run), adapter=str(tmp_path / "lora"))
    assert {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name} == {
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }  # fmt: skip
    export(str(run), tmp_path / "merged", adapter=str(tmp_path / "lora"))
    tokens, merged = torch.arange(20)[None], unmask.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(merged(tokens), adapted(tokens), atol=1e-5, rtol=1e-5)


def test_the_commands_take_it(run: Path, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--checkpoint", str(run)]
    assert main(["generate", *checkpoint, "--prompt", "3 plus 4?", "--steps", "4", "--max_new_tokens", "8"]) == 0
    assert "mdm_mask" not in capsys.readouterr().out
    base = {"pretrained_model_name_or_path": str(run)}
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "next", model=base))
    assert main(["train", "-c", str(path), "--dry-run"]) == 0
    assert re.search(r"parameters +[\d,]+", capsys.readouterr().out)


def test_it_fills_blanks_and_is_scored(run: Path) -> None:
    model, tokenizer = unmask.load_model(str(run)), unmask.load_tokenizer(str(run))
    for sampler in (None, unmask.SamplerConfig(preset="fast"), unmask.SamplerConfig(steps=4, temperature=1.0)):
        (answer,) = unmask.generate(model, "3 plus 4?", tokenizer=tokenizer, sampler=sampler)
        assert 261 not in answer.token_ids
    (filled,) = unmask.infill(model, "3 plus {blank:2} is 7.", tokenizer=tokenizer)
    assert str(filled.text).startswith("3 plus ") and filled.text.endswith(" is 7.")
    score = unmask.log_likelihood(model, tokenizer("3 plus 4?").input_ids, tokenizer("7").input_ids, num_samples=4)
    assert score.value < 0


def golden(fixtures: Path, name: str, folder: Path, **fields: object) -> Any:
    """A golden checkpoint whose config.json says what released ones do not."""
    shutil.copytree(fixtures / "families" / name, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **fields}))
    return unmask.load_model(str(folder)).train()


def loss_and_norm(model: Any, noisy: Any) -> tuple[float, float]:
    model.zero_grad()
    total = MDLM(model.config.mask_token_id).loss(model, noisy).total
    total.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(total.detach()), float(torch.stack(norms).norm())


@pytest.mark.parametrize(("case", "shift"), [("mdlm", False), ("mdlm_shifted", True)])
def test_loss_and_gradient_norm_are_those_of_dllms_trainer(
    case: str, shift: bool, fixtures: Path, tmp_path: Path
) -> None:
    """With the noise that it drew; its weight is 1/(t + 1e-6). A shifted loss reads a token from the place before."""
    model = golden(fixtures, "a2d_qwen3_tiny", tmp_path / "one", attention="bidirectional", mask_token_id=317)
    model.config = dataclasses.replace(model.config, shift=int(shift))
    step = load_file(tmp_path / "one" / "expected.safetensors")
    expected = json.loads((tmp_path / "one" / "expected.json").read_text())["train"]
    tokens, masked = step["train.input_ids"], step["train.masked"].bool()
    supervised, attends = step["train.labels"] != -100, step["train.attention_mask"].bool()
    rows, cut = torch.arange(len(tokens)), torch.zeros(len(tokens), dtype=torch.bool)
    clean = Batch(tokens, supervised, attends, supervised.sum(1), rows, 0, rows, len(tokens), cut, rows)
    levels = (step["train.t"] + 1e-6)[:, None].expand(tokens.shape)
    noisy = MDLM(317).noisy(clean, step["train.noisy_input_ids"], masked, levels)
    assert noisy.counts["mdlm"] == expected["maskable"]
    loss, norm = loss_and_norm(model, noisy)
    assert loss == pytest.approx(expected["cases"][case]["loss"], rel=1e-5)
    assert norm == pytest.approx(expected["cases"][case]["grad_norm"], rel=1e-4)


def test_a_shifted_loss_equals_a_dense_one(fixtures: Path, tmp_path: Path) -> None:
    """Row by row, from the released network's logits, without padding."""
    model = golden(fixtures, "dream_tiny", tmp_path / "one")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 490, (3, 14), generator=generator)
    lengths = torch.tensor([14, 9, 11])
    attends = torch.arange(14) < lengths[:, None]
    masked = attends & (torch.rand(3, 14, generator=generator) < 0.4) & (torch.arange(14) > 2)
    masked[:, 3] = True  # the first supervised token, which the last of the prompt predicts
    supervised = attends & (torch.arange(14) > 2)
    rows, cut = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    clean = Batch(tokens, supervised, attends, supervised.sum(1), rows, 0, rows, 3, cut, rows)
    levels = torch.tensor([0.3, 0.5, 0.8])[:, None].expand(3, 14)
    hidden = torch.where(masked, model.config.mask_token_id, tokens)
    found = loss_and_norm(model, MDLM(model.config.mask_token_id).noisy(clean, hidden, masked, levels))
    total = torch.zeros(())
    model.zero_grad()
    for row, length in enumerate(lengths.tolist()):
        logits = model.logits(model.model(hidden[row : row + 1, :length]))[0]
        for place in masked[row].nonzero()[:, 0].tolist():
            total = total + F.cross_entropy(logits[place - 1], tokens[row, place]) / levels[row, place]
    total = total / supervised.sum()
    total.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    assert found == pytest.approx((float(total.detach()), float(torch.stack(norms).norm())), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("dream_tiny", {}), ("a2d_qwen3_tiny", {"attention": "bidirectional", "mask_token_id": 317})],
)
def test_a_row_alone_is_a_row_in_a_batch(name: str, fields: dict, fixtures: Path, tmp_path: Path) -> None:
    model = golden(fixtures, name, tmp_path / "one", **fields).eval()
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14]]
    sampler = unmask.SamplerConfig(max_new_tokens=12, steps=6, block_size=6)
    together = unmask.generate(model, prompts, sampler=sampler)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = unmask.generate(model, [prompt], sampler=sampler)
        assert alone.token_ids == answer.token_ids and len(alone.token_ids) == 12
