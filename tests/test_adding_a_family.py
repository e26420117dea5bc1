"""Law: a family is a record; one from outside the package trains, saves, loads, samples and is measured by one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from unmask.cli import main
from unmask.errors import ConfigError, SamplingError
from unmask.models.registry import FAMILIES, family_of, resolve
from unmask.models.tokenizer import train_tokenizer
from unmask.training.export import export

HERE = Path(__file__).parent
MODEL = {
    "model_type": "made_up", "width": 16, "layers": 2, "vocab_size": 264, "max_sequence_length": 96,
    "mask_token_id": 261, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def the_line() -> Iterator[None]:
    """The one line that a new family adds, and where Python finds its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        patch.setitem(FAMILIES, "made_up", "made_up_family.family:FAMILY")
        yield
    for name in [name for name in sys.modules if name.startswith("made_up_family")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(tiny: Any, train_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of six steps with mdlm."""
    folder = tmp_path_factory.mktemp("made_up") / "run"
    changes = {"model__config": MODEL, "validation_dataset": tiny.validation(), "step_scheduler__val_every_steps": 3}
    done = train_tiny(tiny.config(folder, **changes))
    assert len(done.losses) == 6
    return folder


def test_it_is_saved_and_loaded(run: Path, tmp_path: Path) -> None:
    model: Any = unmask.load_model(str(run))
    assert type(model).__name__ == "MadeUp" and family_of(model.config).name == "MadeUp"
    assert export(str(run), tmp_path / "out") == []
    again: Any = unmask.load_model(str(tmp_path / "out"))
    assert '"MadeUpForDiffusion"' in (tmp_path / "out" / "config.json").read_text()
    for (key, one), (other_key, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(one, other)


def test_it_samples_and_is_scored(run: Path) -> None:
    model, tokenizer = unmask.load_model(str(run)), unmask.load_tokenizer(str(run))
    for sampler in (None, unmask.SamplerConfig(preset="fast"), unmask.SamplerConfig(steps=4, temperature=1.0)):
        (answer,) = unmask.generate(model, "3 plus 4?", tokenizer=tokenizer, sampler=sampler)
        assert 261 not in answer.token_ids and 0 < len(answer.token_ids) <= 16
    (filled,) = unmask.infill(model, "3 plus {blank:2} is 7.", tokenizer=tokenizer)
    assert str(filled.text).startswith("3 plus ") and filled.text.endswith(" is 7.")
    score = unmask.log_likelihood(model, tokenizer("3 plus 4?").input_ids, tokenizer("7").input_ids, num_samples=4)
    assert score.value < 0


def test_a_cache_that_the_network_does_not_take_is_refused(run: Path) -> None:
    model, sampler = unmask.load_model(str(run)), unmask.SamplerConfig(cache="dual")
    with pytest.raises(SamplingError, match="cache: MadeUp's network takes no keys and values of calls before; use no"):
        unmask.generate(model, [1, 2, 3], sampler=sampler)


def test_an_adapter_takes_what_the_record_allows(
    run: Path, tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    base = {"pretrained_model_name_or_path": str(run)}
    train_tiny(tiny.config(tmp_path / "lora", model=base, peft={"r": 2}))
    adapted: Any = unmask.load_model(str(run), adapter=str(tmp_path / "lora"))
    assert {name for name, _ in adapted.named_parameters() if "lora_A" in name} == {
        f"layers.{layer}.qkv.lora_A.default.weight" for layer in range(2)
    }
    export(str(run), tmp_path / "merged", adapter=str(tmp_path / "lora"))
    ids = torch.arange(20)[None]
    merged: Any = unmask.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(merged(ids), adapted(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"peft.target_modules: '\*out' matches no .*the head stays as it is"):
        train_tiny(tiny.config(tmp_path / "head", model=base, peft={"target_modules": ["*out"]}))


def test_a_dry_run_counts_its_memory(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "run.yaml", tiny.config(tmp_path / "run", model__config=MODEL))
    assert main(["train", "-c", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "estimated memory" in said and re.search(r"parameters +[\d,]+", said)


def test_an_objective_for_another_noise_is_refused(tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    values = tiny.config(tmp_path / "run", model__config=MODEL, dllm={"mode": "block_diffusion"})
    with pytest.raises(ConfigError, match="dllm.mode: block_diffusion: made_up is not trained with uniform noise"):
        train_tiny(values)


def test_a_tokenizer_is_trained_with_its_control_tokens() -> None:
    family = resolve("made_up_family.family:FAMILY")
    tokenizer = train_tokenizer(["3 plus 4"], 270, family.control_tokens)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 0, 1)


def test_the_guide_names_four_files() -> None:
    """Three files of the family, and the one that has the table."""
    guide = (HERE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d\. `([\w./]+\.py)`", guide.partition("## Adding a family")[2].partition("\n## ")[0], re.M)
    folder = "unmask/models/sedd/"
    assert steps == [folder + "config.py", folder + "model.py", folder + "family.py", "unmask/models/registry.py"]
    assert sorted(path.name for path in (HERE / "made_up_family").glob("[a-z]*.py")) == [
        "config.py", "family.py", "model.py",
    ]  # fmt: skip
