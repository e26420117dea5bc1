"""LLaDA through transformers' Auto classes: the same numbers, no remote code, no question on standard input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from unmask import load_tokenizer
from unmask.errors import ModelError
from unmask.models.llada.auto import LLaDAModelLM, register
from unmask.models.llada.model import LLaDA
from unmask.models.loading import load_model
from unmask.models.weights import save_weights

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    register()  # repeatable


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_give_the_native_logits(auto, reference_folder: Path, reference_model: LLaDA) -> None:
    model = auto.from_pretrained(reference_folder)
    assert type(model) is LLaDAModelLM and model.config.model_type == "llada" and not model.training
    assert set(model.state_dict()) == set(reference_model.state_dict())
    with torch.no_grad():
        theirs = model(input_ids=TOKENS, attention_mask=MASK, return_dict=True, use_cache=False, labels=None).logits
        ours = reference_model.logits(reference_model(TOKENS, MASK))
        assert torch.equal(theirs, ours)
        moved = model(input_ids=TOKENS, position_ids=torch.arange(6, 0, -1)[None]).logits
        assert not torch.allclose(moved, model(TOKENS).logits, atol=1e-3)


def test_auto_config_keeps_the_released_fields(reference_folder: Path) -> None:
    config = AutoConfig.from_pretrained(reference_folder)
    released = json.loads((reference_folder / "config.json").read_text())
    for name in released.keys() - {"torch_dtype", "use_cache"}:  # both moved in transformers 5
        assert getattr(config, name) == released[name], name
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)


@pytest.mark.parametrize("fields", [{}, {"weight_tying": True}, {"n_kv_heads": 2, "include_qkv_bias": True}], ids=str)
def test_what_transformers_saves_loads_natively(fields: dict, network, reference_folder: Path, tmp_path: Path) -> None:
    native = network(**fields).eval()
    (tmp_path / "ours").mkdir()
    values = {name: value for name, value in vars(native.config).items() if value is not None}
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"model_type": "llada", **values}))
    save_weights(native.state_dict().items(), tmp_path / "ours")
    through = AutoModel.from_pretrained(tmp_path / "ours")
    through.save_pretrained(tmp_path / "theirs")
    back = load_model(str(tmp_path / "theirs"))
    assert list(back.state_dict()) == list(native.state_dict())
    for name, tensor in native.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
        assert torch.equal(through.state_dict()[name], tensor), name


def test_fresh_weights_of_an_auto_model_are_drawn(reference_folder: Path) -> None:
    model: PreTrainedModel = AutoModel.from_config(AutoConfig.from_pretrained(reference_folder))
    state = model.state_dict()
    assert float(state["model.transformer.wte.weight"].std()) == pytest.approx(1 / 8, rel=0.1)
    assert (state["model.transformer.ln_f.weight"] == 1).all()
    assert model.get_input_embeddings() is model.model["transformer"].wte
    assert model.get_output_embeddings() is model.model["transformer"].ff_out


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("labels", TOKENS, "unmask train"),
        ("inputs_embeds", torch.zeros(2, 6, 64), "give input_ids"),
        ("past_key_values", [1], "unmask generate"),
        ("output_hidden_states", True, "leave it out"),
        ("token_type_ids", TOKENS, "leave it out"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(name, value, remedy: str, reference_folder: Path) -> None:
    model = AutoModel.from_pretrained(reference_folder)
    with pytest.raises(ModelError, match=f"does not take {name}.*{remedy}"):
        model(TOKENS, **{name: value})
    with pytest.raises(ModelError, match="needs input_ids"):
        model()


def test_unsupported_configurations_are_refused_there_too(reference_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(reference_folder, tmp_path / "model")
    values = json.loads((reference_folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | {"alibi": True}))
    with pytest.raises(ModelError, match="alibi=True is not supported"):
        AutoModel.from_pretrained(tmp_path / "model")


def test_the_tokenizer_comes_without_remote_code(fixtures: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(str(fixtures / "mdlm_step"))
    assert len(tokenizer("What is 2 + 3?")["input_ids"]) > 3
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


# What a fresh process meets, in the order in which it meets it: imports cannot be undone.
FRESH = """
import sys
exported, local, released = sys.argv[1:]
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(exported)
except ValueError as error:
    print("does not recognize this architecture" in str(error), "trust_remote_code" in str(error))
import unmask
print(len(unmask.load_tokenizer(local)("a b").input_ids) > 0, "transformers.modeling_utils" in sys.modules)
model, tokenizer = unmask.load_model(released), unmask.load_tokenizer(released)
print(type(model).__name__, len(tokenizer))
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(released)
unmask.register()
print(type(AutoModelForCausalLM.from_pretrained(released)).__name__)
"""


@pytest.fixture(scope="module")
def fresh(fixtures: Path, reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines that a process of its own printed, whose standard input nobody ever writes: a prompt would hang it."""
    from unmask.training.export import export

    root = tmp_path_factory.mktemp("fresh")
    released, exported, local = fixtures / "mdlm_step", root / "exported", root / "local"
    export(str(released), exported)
    assert "auto_map" in json.loads((released / "config.json").read_text())
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    local.mkdir()
    values = json.loads((reference_folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "configuration_llada.LLaDAConfig"}  # the remote code of a released folder
    (local / "config.json").write_text(json.dumps(values))
    shutil.copy(released / "tokenizer.json", local)
    read, write = os.pipe()
    try:
        words = [sys.executable, "-c", FRESH, str(exported), str(local), str(released)]
        done = subprocess.run(words, stdin=read, capture_output=True, text=True, timeout=100)
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in done.stderr + done.stdout
    return done.stdout.splitlines()


def test_an_export_names_no_code_that_is_not_there(fresh: list[str]) -> None:
    """Without unmask, transformers must say what it lacks, not ask to run a file that nobody wrote."""
    assert fresh[0] == "True False"


def test_a_tokenizer_loads_without_the_model_classes(fresh: list[str]) -> None:
    assert fresh[1] == "True False"


def test_nothing_asks_on_standard_input(fresh: list[str]) -> None:
    """The released config.json names remote code; unregistered, transformers would stop and ask."""
    assert fresh[2:] == ["LLaDA 4096", "LLaDAModelLM"]
