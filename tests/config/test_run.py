"""The configuration: read, overridden, refused with the field's name, and written back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from unmask.config import config_from_mapping, dump_config, load_config, parse_overrides
from unmask.config.distributed import MixedPrecisionConfig
from unmask.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "dllm_sft"


def minimal(**changes: object) -> dict:
    values: dict = {
        "model": {"pretrained_model_name_or_path": "somewhere"},
        "dataset": {"path_or_dataset_id": "rows.jsonl"},
        "step_scheduler": {"max_steps": 10},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return values


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(values)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["llada_sft.yaml", "llada_lora.yaml"])
def test_the_examples_carry_the_published_recipe(name: str) -> None:
    loaded = load_config(EXAMPLES / name)
    config = loaded.config
    assert loaded.not_needed == ()
    assert config.model.pretrained_model_name_or_path == "GSAI-ML/LLaDA-8B-Base"
    assert (config.model.torch_dtype, config.distributed.autocast_dtype) == ("float32", "bfloat16")
    assert config.distributed.mp_policy == MixedPrecisionConfig("bfloat16")  # as in AutoModel's own
    assert (config.dataset.path_or_dataset_id, config.dataset.split) == ("allenai/tulu-3-sft-mixture", "train")
    assert (config.dataset.seq_length, config.dataset.shuffle_seed) == (1024, 42)
    assert (config.dllm.mode, config.dllm.mask_token_id, config.dllm.eps) == ("mdlm", 126336, 0.001)
    assert config.dllm.supervise_padding and config.dataloader.group_by_length
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (2e-5, (0.9, 0.999), 1e-8, 0.0)
    assert (config.lr_scheduler.lr_decay_style, config.clip_grad_norm.max_norm) == ("cosine", 1.0)
    steps = config.step_scheduler
    assert (steps.global_batch_size, steps.local_batch_size, steps.num_epochs, steps.max_steps) == (32, 4, 5, None)


def test_the_lora_example_is_the_full_one_with_an_adapter() -> None:
    full, lora = (load_config(EXAMPLES / name).config for name in ("llada_sft.yaml", "llada_lora.yaml"))
    assert full.peft is None and lora.peft is not None
    assert (lora.peft.r, lora.peft.lora_alpha) == (16, 32)
    for section in ("model", "dataset", "step_scheduler", "dllm", "dataloader", "optimizer", "lr_scheduler", "seed"):
        assert getattr(full, section) == getattr(lora, section)


def test_a_written_configuration_reads_back_equal() -> None:
    config = config_from_mapping(minimal(peft__r=4, optimizer__betas=[0.8, 0.9], wandb__enable=False)).config
    assert config_from_mapping(yaml.safe_load(dump_config(config))).config == config


def test_defaults_are_the_documented_ones() -> None:
    config = config_from_mapping(minimal()).config
    assert config.seed == 42
    assert not config.dllm.supervise_padding
    assert config.peft is None and config.wandb is None and config.validation_dataset is None
    assert config.clip_grad_norm.max_norm == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser__lr": 1}, ["optimiser", "unknown key", "optimizer"]),
        ({"optimizer__learning_rate": 1}, ["optimizer.learning_rate", "unknown key", "lr, betas"]),
        ({"optimizer__lr": "fast"}, ["optimizer.lr", "'fast'", "a number"]),
        ({"optimizer__lr": -1}, ["optimizer.lr", "-1"]),
        ({"optimizer__lr": float("nan")}, ["optimizer.lr", "finite"]),
        ({"optimizer__betas": [0.9]}, ["optimizer.betas", "2 values"]),
        ({"optimizer__betas": [0.9, 1.0]}, ["optimizer.betas", "[0, 1)"]),
        ({"optimizer__name": "adamv"}, ["optimizer.name", "'adamw'"]),
        ({"step_scheduler__max_steps": "ten"}, ["step_scheduler.max_steps", "an integer", "'ten'"]),
        ({"step_scheduler__max_steps": 0}, ["step_scheduler.max_steps", "at least 1"]),
        ({"step_scheduler__max_steps": None}, ["step_scheduler.max_steps", "num_epochs"]),
        ({"step_scheduler__global_batch_size": 6}, ["step_scheduler.global_batch_size", "6", "local_batch_size 4"]),
        ({"step_scheduler__val_every_steps": 5}, ["step_scheduler.val_every_steps", "validation_dataset"]),
        ({"dllm__mode": "mdml"}, ["dllm.mode", "'mdml'", "did you mean 'mdlm'"]),
        ({"dllm__eps": 0}, ["dllm.eps", "between 0 and 1"]),
        ({"dllm__supervise_padding": "yes please"}, ["dllm.supervise_padding", "true or false"]),
        ({"dllm__normalization": "tokens"}, ["dllm.normalization", "did you mean 'token'"]),
        ({"dllm__block_size": 32}, ["dllm.block_size", "32"]),
        ({"dataset__unshifted": False}, ["dataset.unshifted", "true"]),
        ({"dataset__seq_lenght": 5}, ["dataset.seq_lenght", "did you mean 'seq_length'"]),
        ({"dataset__seq_length": 1}, ["dataset.seq_length", "at least 2"]),
        ({"model__config": {}}, ["model.pretrained_model_name_or_path", "not both"]),
        ({"model__torch_dtype": "fp32"}, ["model.torch_dtype", "float32"]),
        ({"model": None}, ["model.pretrained_model_name_or_path"]),
        ({"lr_scheduler__lr_decay_style": "cosin"}, ["lr_scheduler.lr_decay_style", "did you mean 'cosine'"]),
        ({"lr_scheduler__lr_warmup_steps": -1}, ["lr_scheduler.lr_warmup_steps", "-1"]),
        ({"clip_grad_norm__max_norm": 0}, ["clip_grad_norm.max_norm", "positive"]),
        ({"clip_grad_norm": 1.0}, ["clip_grad_norm", "section"]),
        ({"distributed__autocast_dtype": "bf16"}, ["distributed.autocast_dtype", "bfloat16"]),
        ({"distributed__device": "gpu"}, ["distributed.device", "auto, cpu, cuda"]),
        ({"peft__r": 0}, ["peft.r", "at least 1"]),
        ({"peft__lora_dropout": 1.0}, ["peft.lora_dropout", "[0, 1)"]),
        ({"checkpoint__max_recent_checkpoints": 0}, ["checkpoint.max_recent_checkpoints", "at least 1"]),
        ({"wandb__tracker": "tensorbord"}, ["wandb.tracker", "did you mean 'tensorboard'"]),
        ({"dataloader__num_workers": -1}, ["dataloader.num_workers"]),
        ({"seed": "lucky"}, ["seed", "an integer"]),
        ({"dataset": "rows.jsonl"}, ["dataset", "section"]),
        (
            {"validation_dataset": {"path_or_dataset_id": "v.jsonl", "tokenizer": "other"}},
            ["validation_dataset.tokenizer", "'other'", "'somewhere'", "remove it or set it equal"],
        ),
        (
            {"validation_dataset": {"path_or_dataset_id": "v.jsonl", "chat_template": "llada"}},
            ["validation_dataset.chat_template", "'llada'", "remove it or set it equal"],
        ),
        (
            {"validation_dataset": {"path_or_dataset_id": "v.jsonl", "chat_template_kwargs": {"x": 1}}},
            ["validation_dataset.chat_template_kwargs", "{'x': 1}", "remove it or set it equal"],
        ),
        (
            {"validation_dataset": {"path_or_dataset_id": "v.jsonl", "shuffle_seed": 1}},
            ["validation_dataset.shuffle_seed", "not shuffled", "remove it"],
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict, words: list[str]) -> None:
    text = refusal(minimal(**changes))
    for word in words:
        assert word in text


def test_a_missing_section_is_named() -> None:
    values = minimal()
    del values["dataset"]
    assert "dataset: required" in refusal(values)


def test_overrides_reach_every_depth_and_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    words = ["--optimizer.lr", "3e-4", "--seed=7", "--model.torch_dtype=bfloat16", "--optimizer.betas", "[0.8, 0.95]"]
    words += ["--step_scheduler.max_steps", "null", "--step_scheduler.num_epochs", "2", "--peft.r", "8"]
    config = load_config(path, words).config
    assert (config.optimizer.lr, config.optimizer.betas) == (3e-4, (0.8, 0.95))
    assert (config.seed, config.model.torch_dtype) == (7, "bfloat16")
    assert (config.step_scheduler.max_steps, config.step_scheduler.num_epochs) == (None, 2)
    assert config.peft is not None and config.peft.r == 8


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optimizer.lr"], "--optimizer.lr: a value must follow"),
        (["--optimizer.lr", "--seed", "1"], "--optimizer.lr: a value must follow"),
        (["lr", "1"], "'lr'"),
        (["--optimizer.lr", "[1"], "--optimizer.lr: '[1' is not a YAML value"),
        (["--seed.deep", "1"], "--seed.deep: seed is not a section"),
        (["--optimizer.lrr", "1"], "optimizer.lrr"),
        (["--max_steps", "1"], "max_steps: unknown key"),
    ],
)
def test_an_override_that_says_nothing_is_refused(tmp_path: Path, words: list[str], named: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**minimal(), "seed": 1}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, words)
    assert named in str(caught.value)


def test_negative_values_are_values() -> None:
    assert parse_overrides(["--a.b", "-1", "--c=-2.5"]) == [("a.b", -1), ("c", -2.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", ["not valid YAML", "line"]),
        ("model:\n  a: 1\n  a: 2\n", ["'a' is given twice", "line 3"]),
        ("just words", ["expected sections"]),
        ("", ["expected sections"]),
        ("- 1\n- 2\n", ["expected sections"]),
        ("? [1, 2]\n: 3\n", ["not valid YAML"]),
        ("a: !!python/object:os.system {}\n", ["not valid YAML"]),
        ("a: \t- b\n", ["not valid YAML"]),
        ("a: \x00\n", ["not valid YAML"]),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    said = str(caught.value)
    assert str(path) in said and "\n" not in said
    for word in words:
        assert word in said


def test_missing_unreadable_and_wrongly_encoded_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: {a: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin.yaml: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_yaml_anchors_and_merges_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {pretrained_model_name_or_path: m}\n"
        "dataset: &rows {path_or_dataset_id: a.jsonl, seq_length: 64}\n"
        "validation_dataset:\n  <<: *rows\n  path_or_dataset_id: b.jsonl\n"
        "step_scheduler: {max_steps: 1}\n"
    )
    section = load_config(path).config.validation_dataset
    assert section is not None and (section.path_or_dataset_id, section.seq_length) == ("b.jsonl", 64)


@pytest.mark.parametrize("tokenizer", [None, "tok"])
def test_validation_may_name_the_tokenizer_and_template_of_training(tokenizer: str | None) -> None:
    same = {"tokenizer": tokenizer or "somewhere", "chat_template": "llada"}
    values = minimal(validation_dataset={"path_or_dataset_id": "v.jsonl", **same}, dataset__chat_template="llada")
    values["dataset"]["tokenizer"] = tokenizer  # null takes the model's own
    section = config_from_mapping(values).config.validation_dataset
    assert section is not None and (section.tokenizer, section.chat_template) == tuple(same.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"lr_scheduler__lr_warmup_steps": 5, "lr_scheduler__lr_decay_steps": 5},
            "lr_scheduler.lr_decay_steps: 5 is not after lr_warmup_steps 5",
        ),
        ({"lr_scheduler__min_lr": 1e-3}, "lr_scheduler.min_lr: 0.001 is above optimizer.lr 2e-05"),
        ({"lr_scheduler__init_lr": 1e-3}, "lr_scheduler.init_lr: 0.001 is above optimizer.lr 2e-05"),
    ],
)
def test_rates_that_cannot_be_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        config_from_mapping(minimal(**changes))


def test_rates_at_their_limits_are_taken() -> None:
    rates = {"lr_warmup_steps": 9, "lr_decay_steps": 10, "min_lr": 2e-5, "init_lr": 2e-5}
    assert config_from_mapping(minimal(lr_scheduler=rates)).config.lr_scheduler.lr_warmup_steps == 9
    one_step = minimal(step_scheduler={"max_steps": 1}, lr_scheduler={"lr_warmup_steps": 25})
    assert config_from_mapping(one_step).config.lr_scheduler.lr_warmup_steps == 25
