"""NeMo AutoModel's dLLM YAML: accepted, equal to our own, and refused where it would train something else."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

from unmask.automodel import translate
from unmask.config import RunConfig, config_from_mapping, load_config
from unmask.config.distributed import DistributedConfig, MixedPrecisionConfig
from unmask.config.objective import AUTOMODEL_MODES, MODES, DllmConfig
from unmask.errors import ConfigError, FieldError

EXAMPLES = Path(__file__).parents[1] / "examples" / "dllm_sft"
CHAT = "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset"

# Every key that AutoModel's LLaDA recipes carry.
THEIRS: dict = {
    "recipe": "DiffusionLMSFTRecipe",
    "step_scheduler": {
        "global_batch_size": 32,
        "local_batch_size": 4,
        "ckpt_every_steps": 500,
        "val_every_steps": 500,
        "max_steps": None,
        "num_epochs": 5,
    },
    "dist_env": {"backend": "nccl", "timeout_minutes": 10},
    "seed": 42,
    "wandb": {"enable": False, "project": "some-project", "name": "some-run"},
    "model": {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "GSAI-ML/LLaDA-8B-Base",
        "torch_dtype": "float32",
        "trust_remote_code": True,
        "backend": {"attn": "te"},
    },
    "checkpoint": {
        "enabled": True,
        "checkpoint_dir": "dllm_checkpoints/llada_sft",
        "model_save_format": "safetensors",
        "save_consolidated": False,
    },
    "distributed": {
        "strategy": "fsdp2",
        "dp_size": "none",
        "tp_size": 1,
        "cp_size": 1,
        "pp_size": 1,
        "sequence_parallel": False,
        "activation_checkpointing": False,
        "mp_policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "float32"},
        "autocast_dtype": "bfloat16",
        "offload_policy": None,
    },
    "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
    "dllm": {"mode": "mdlm", "mask_token_id": 126336, "eps": 0.001, "supervise_padding": True},
    "optimizer": {
        "_target_": "torch.optim.AdamW",
        "betas": [0.9, 0.999],
        "eps": "1e-8",
        "lr": "2e-5",
        "weight_decay": 0.0,
    },
    "clip_grad_norm": {"max_norm": 1.0},
    "lr_scheduler": {"lr_decay_style": "cosine", "init_lr": 0.0, "min_lr": 0.0},
    "dataset": {
        "_target_": CHAT,
        "path_or_dataset_id": "allenai/tulu-3-sft-mixture",
        "split": "train",
        "shuffle_seed": 42,
        "seq_length": 1024,
        "truncation": True,
        "unshifted": True,
        "chat_template": "llada",
        "tokenizer": {"pretrained_model_name_or_path": "GSAI-ML/LLaDA-8B-Base", "trust_remote_code": True},
    },
    "dataloader": {
        "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
        "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
        "group_by_length": True,
    },
    "ci": {"time": "00:45:00", "recipe_owner": "somebody"},
}
PEFT = {
    "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
    "match_all_linear": False,
    "target_modules": [f"*.{n}" for n in "q_proj k_proj v_proj att_proj attn_out ff_proj up_proj ff_out".split()],
    "dim": 16,
    "alpha": 32,
}


def theirs(values: dict = THEIRS, /, **changes: object) -> dict:
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return values


def assert_same_training(config: RunConfig, ours: RunConfig) -> None:
    """Assert equal sections; a run's place and tracker, and dtypes that several processes alone have, may differ."""
    for section in RunConfig.__dataclass_fields__:
        if section not in ("wandb", "checkpoint", "distributed"):
            assert getattr(config, section) == getattr(ours, section), section
    assert dataclasses.replace(config.distributed, mp_policy=ours.distributed.mp_policy) == ours.distributed


def test_their_full_recipe_is_our_example_but_for_the_answers() -> None:
    loaded = config_from_mapping(theirs(dataset__answers="one"))
    assert_same_training(loaded.config, load_config(EXAMPLES / "llada_sft.yaml").config)
    assert loaded.config.checkpoint.checkpoint_dir == "dllm_checkpoints/llada_sft"


def test_their_lora_recipe_is_our_example_but_for_the_answers() -> None:
    loaded = config_from_mapping(theirs(dataset__answers="one", peft=copy.deepcopy(PEFT)))
    assert_same_training(loaded.config, load_config(EXAMPLES / "llada_lora.yaml").config)
    assert "peft.target_modules *.att_proj" in loaded.not_needed


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, "all"),
        ({"mask_history": None}, "all"),
        ({"mask_history": False}, "all"),
        ({"mask_history": True}, "last"),
        ({"answers": "one"}, "one"),
    ],
)
def test_their_loader_trains_every_answer_unless_the_history_is_masked(said: dict, meant: str) -> None:
    changes = {f"dataset__{name}": value for name, value in said.items()}
    validation = {**THEIRS["dataset"], **said}
    del validation["shuffle_seed"]
    config = config_from_mapping(theirs(validation_dataset=validation, **changes)).config
    assert config.validation_dataset is not None
    assert config.dataset.answers == config.validation_dataset.answers == meant
    ours = {"model": {}, "dataset": {"path_or_dataset_id": "rows.jsonl"}}
    assert translate(ours).values == ours


def test_each_key_without_influence_is_listed_once() -> None:
    listed = config_from_mapping(theirs()).not_needed
    assert len(set(listed)) == len(listed)
    assert set(listed) == {
        "recipe", "ci", "dist_env", "loss_fn", "model.trust_remote_code", "model.backend",
        "dataset.tokenizer.trust_remote_code", "dataloader.collate_fn", "checkpoint.model_save_format",
        "distributed.sequence_parallel", "step_scheduler.val_every_steps",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model___target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config"}, "model._target_"),
        ({"optimizer___target_": "torch.optim.SGD"}, "optimizer._target_"),
        ({"optimizer__amsgrad": True}, "optimizer.amsgrad"),
        ({"loss_fn___target_": "somewhere.LinearCrossEntropy"}, "loss_fn._target_"),
        ({"dataset___target_": "somewhere.ColumnMappedDataset"}, "dataset._target_"),
        ({"dataset__mask_reasoning_content": True}, "dataset.mask_reasoning_content"),
        ({"dataset__tokenizer__padding_side": "left"}, "dataset.tokenizer.padding_side"),
        ({"dataset__unshifted": False}, "dataset.unshifted"),
        ({"distributed__tp_size": 2}, "distributed.tp_size"),
        ({"distributed__cp_size": 2}, "distributed.cp_size"),
        ({"distributed__pp_size": 2}, "distributed.pp_size"),
        ({"distributed__strategy": "megatron_fsdp"}, "distributed.strategy"),
        ({"distributed__sequence_parallel": True}, "distributed.sequence_parallel"),
        ({"distributed__offload_policy": {"_target_": "x"}}, "distributed.offload_policy"),
        ({"distributed__mp_policy__reduce_dtype": "float16"}, "distributed.mp_policy.reduce_dtype"),
        ({"distributed__mp_policy__cast_forward_inputs": False}, "distributed.mp_policy.cast_forward_inputs"),
        ({"distributed__autocast_dtype": "float16"}, "distributed.autocast_dtype"),
        ({"peft": {**PEFT, "match_all_linear": True}}, "peft.match_all_linear"),
        ({"peft": {**PEFT, "lora_A_init": "xavier"}}, "peft.lora_A_init"),
        ({"peft": {**PEFT, "r": 4}}, "peft.dim"),
        ({"dllm__mode": "hybrid", "dllm__half_life_ratio": 0.25}, "dllm.mode"),
        ({"dllm__block_size": 32}, "dllm.block_size"),
        ({"dllm__pad_block_size": 32}, "dllm.pad_block_size"),
        ({"dllm__pad_seq_len_divisible": 64}, "dllm.pad_seq_len_divisible"),
        ({"model__canvas_length": 256}, "dllm.block_size"),
        ({"dllm__half_life_ratio": 0.25}, "dllm.half_life_ratio"),
        ({"lr_scheduler__wd_incr_style": "linear"}, "lr_scheduler.wd_incr_style"),
        ({"packed_sequence": {"packed_sequence_size": 1024}}, "packed_sequence"),
        ({"wandb___target_": "x"}, "wandb._target_"),
    ],
)
def test_a_key_that_would_change_results_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(theirs(**changes))
    assert str(caught.value).startswith(named + ":") and "\n" not in str(caught.value)


def test_what_their_file_leaves_out_keeps_their_default() -> None:
    values = theirs()
    for name in ("lr", "weight_decay", "betas", "eps"):
        del values["optimizer"][name]
    values["lr_scheduler"] = {"lr_decay_style": "linear"}
    config = config_from_mapping(values).config
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-3, 0.01)  # torch.optim.AdamW's
    schedule = config.lr_scheduler
    assert (schedule.init_lr, schedule.min_lr) == (pytest.approx(1e-4), pytest.approx(1e-5))
    assert schedule.warmup_steps(5000) == 500 and schedule.warmup_steps(10**6) == 1000


def test_tracking_without_enable_is_on_as_it_is_there() -> None:
    config = config_from_mapping(theirs(wandb={"project": "p", "save_dir": "logs"})).config
    assert config.wandb is not None and config.wandb.enable and config.wandb.tracker == "wandb"


def test_dtypes_and_words_for_nothing_are_read_as_they_are_meant() -> None:
    values = theirs(distributed__mp_policy__param_dtype="torch.bfloat16", distributed__autocast_dtype="torch.bfloat16")
    section = config_from_mapping(values).config.distributed
    assert section.mp_policy == MixedPrecisionConfig("bfloat16", "float32", "float32")
    assert section.autocast_dtype == "bfloat16" and section.dp_size is None and section.offload_policy is None
    for name in ("tp_size", "strategy", "mp_policy", "autocast_dtype"):
        values["distributed"][name] = "none"
    section = config_from_mapping(values).config.distributed
    assert section == DistributedConfig()
    values["distributed"] = {"strategy": "ddp", "mp_policy": {"param_dtype": None}, "dp_size": 2, "tp_size": 1}
    loaded = config_from_mapping(values)
    assert loaded.config.distributed == DistributedConfig(dp_size=2) and "distributed.strategy" in loaded.not_needed


def test_their_offloading_is_ours() -> None:
    policy = {"_target_": "torch.distributed.fsdp.CPUOffloadPolicy", "pin_memory": True}
    assert config_from_mapping(theirs(distributed__offload_policy=policy)).config.distributed.offload_policy == "cpu"


def test_an_adapter_section_that_loses_all_its_keys_still_trains_an_adapter() -> None:
    values = theirs(peft={"_target_": PEFT["_target_"], "match_all_linear": False})
    assert config_from_mapping(values).config.peft is not None
    assert config_from_mapping(theirs(peft={"dim": 4})).config.peft.r == 4  # pyright: ignore[reportOptionalMemberAccess]


def test_the_only_split_of_a_local_file_is_not_needed() -> None:
    values = theirs(dataset__path_or_dataset_id="./rows.jsonl")
    loaded = config_from_mapping(values)
    assert loaded.config.dataset.split is None and "dataset.split" in loaded.not_needed


def test_the_given_mapping_is_left_alone() -> None:
    values = theirs()
    translate(values)
    assert values == THEIRS


def test_our_own_keys_pass_untouched() -> None:
    ours = {"model": {"config": "c.json"}, "optimizer": {"lr": 1e-4}, "lr_scheduler": {"lr_decay_style": "cosine"}}
    translated = translate(ours)
    assert translated.values == ours and translated.not_needed == ()


def test_the_shuffle_seed_of_validation_rows_is_not_needed() -> None:
    loaded = config_from_mapping(theirs(validation_dataset={"path_or_dataset_id": "v.jsonl", "shuffle_seed": 42}))
    assert "validation_dataset.shuffle_seed" in loaded.not_needed
    assert loaded.config.validation_dataset is not None and loaded.config.validation_dataset.shuffle_seed is None
    with pytest.raises(ConfigError, match=r"^validation_dataset\.chat_template: 'own' "):
        config_from_mapping(theirs(validation_dataset={"path_or_dataset_id": "v.jsonl", "chat_template": "own"}))


# What AutoModel's DiffusionGemma recipes carry.
GEMMA: dict = {
    "recipe": "DiffusionGemmaSFTRecipe",
    "seed": 42,
    "dist_env": {"backend": "nccl", "timeout_minutes": 5},
    "model": {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "google/diffusiongemma-26B-A4B-it",
        "torch_dtype": "float32",
        "canvas_length": 256,
        "self_conditioning": True,
        "freeze_router": True,
        "backend": {"_target_": "somewhere.BackendConfig", "attn": "sdpa", "experts": "torch_mm"},
    },
    "dllm": {
        "mode": "block_diffusion",
        "block_size": 256,
        "vocab_size": 262144,
        "eps": 0.001,
        "pad_block_size": 256,
        "pad_seq_len_divisible": 256,
    },
    "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
    "distributed": {
        "strategy": "fsdp2",
        "dp_size": "none",
        **dict.fromkeys(("tp_size", "cp_size", "pp_size"), 1),
        "ep_size": 8,
        "sequence_parallel": False,
        "activation_checkpointing": True,
        "mp_policy": dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), "float32"),
        "autocast_dtype": "bfloat16",
        "offload_policy": None,
        "moe": {"reshard_after_forward": False},
    },
    "optimizer": {
        "_target_": "torch.optim.AdamW",
        "lr": 1.5e-4,
        "betas": [0.95, 0.99],
        "eps": 1e-8,
        "weight_decay": 1e-4,
    },
    "lr_scheduler": {"lr_decay_style": "cosine", "lr_warmup_steps": 25, "init_lr": 0.0, "min_lr": 1.5e-5},
    "clip_grad_norm": {"max_norm": 1.0},
    "step_scheduler": {
        "global_batch_size": 8,
        "local_batch_size": 1,
        "max_steps": 800,
        "num_epochs": 1,
        "ckpt_every_steps": 400,
        "val_every_steps": 100000,
        "log_remote_every_steps": 5,
    },
    "dataset": {
        "_target_": CHAT,
        "path_or_dataset_id": "gsm8k_chat_train.jsonl",
        "split": "train",
        "shuffle_seed": 42,
        "seq_length": 1024,
        "truncation": True,
        "unshifted": True,
        "mask_history": True,
        "chat_template": "examples/dllm_sft/diffusion_gemma_chat_template.jinja",
        "tokenizer": {"pretrained_model_name_or_path": "google/diffusiongemma-26B-A4B-it"},
    },
    "dataloader": {"_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "collate_fn": "x", "shuffle": True},
    "checkpoint": {
        "enabled": True,
        "checkpoint_dir": "dllm_checkpoints/diffusion_gemma",
        "model_save_format": "safetensors",
        "save_consolidated": "final",
    },
    "wandb": {"enable": False, "project": "some-project"},
}
GEMMA_PEFT = {
    "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
    "match_all_linear": False,
    "target_modules": [
        *(f"*self_attn.{name}_proj" for name in "qkvo"),
        *(f"*.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ],
    "dim": 16,
    "alpha": 32,
}


def gemma(**changes: object) -> dict:
    return theirs(GEMMA, **changes)


def test_their_diffusion_gemma_recipe_is_our_example() -> None:
    loaded = config_from_mapping(gemma())
    assert_same_training(loaded.config, load_config(EXAMPLES / "diffusion_gemma_sft.yaml").config)
    assert loaded.config.distributed.mp_policy == MixedPrecisionConfig("float32", "float32", "float32")
    assert set(loaded.not_needed) == {
        "recipe", "dist_env", "loss_fn", "model.backend", "model.self_conditioning", "distributed.moe",
        "distributed.sequence_parallel", "dllm.pad_block_size", "dllm.pad_seq_len_divisible", "dataset.split",
        "dataloader.collate_fn", "checkpoint.model_save_format",
        "step_scheduler.log_remote_every_steps", "step_scheduler.val_every_steps",
    }  # fmt: skip


def test_their_diffusion_gemma_lora_recipe_is_our_example() -> None:
    loaded = config_from_mapping(gemma(peft=copy.deepcopy(GEMMA_PEFT)))
    assert_same_training(loaded.config, load_config(EXAMPLES / "diffusion_gemma_lora.yaml").config)


def test_what_their_model_section_says_of_the_objective_is_the_objectives() -> None:
    values = gemma(model__self_conditioning=False, model__freeze_router=False)
    del values["dllm"]["block_size"]
    section = config_from_mapping(values).config.dllm
    assert (section.block_size, section.self_conditioning_p, section.freeze_router) == (256, 0.0, False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__canvas_length": 128}, "model.canvas_length: 128 contradicts dllm.block_size, which is 256"),
        ({"dllm__pad_block_size": 64}, "dllm.pad_block_size: 64 contradicts dllm.block_size"),
        ({"model__self_conditioning": "yes"}, "model.self_conditioning: expected true or false, got 'yes'"),
        (
            {"model__self_conditioning": False, "dllm__self_conditioning_p": 0.5},
            "model.self_conditioning: 0.0 contradicts dllm.self_conditioning_p, which is 0.5",
        ),
        ({"model__freeze_router": False, "dllm__freeze_router": True}, "model.freeze_router: False contradicts"),
        ({"dllm__mask_token_id": 4}, "dllm.mask_token_id: 4 has no meaning for mode block_diffusion"),
        ({"distributed__cp_size": 16}, "distributed.cp_size: 16 is not available"),
    ],
)
def test_contradictions_in_a_diffusion_gemma_file_are_named(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(gemma(**changes))
    assert str(caught.value).startswith(named) and "\n" not in str(caught.value)


def test_a_template_of_theirs_that_is_here_is_used(tmp_path: Path) -> None:
    path = tmp_path / "diffusion_gemma_chat_template.jinja"
    assert config_from_mapping(gemma(dataset__chat_template=str(path))).config.dataset.chat_template == (
        "diffusion_gemma"
    )
    path.write_text("x")
    assert config_from_mapping(gemma(dataset__chat_template=str(path))).config.dataset.chat_template == str(path)
    llada = theirs(dataset__chat_template="examples/dllm_sft/llada_chat_template.jinja")
    assert config_from_mapping(llada).config.dataset.chat_template == "llada"


def test_a_template_that_is_missing_stays_missing_in_a_file_of_ours() -> None:
    path = "examples/dllm_sft/diffusion_gemma_chat_template.jinja"
    assert translate({"dataset": {"chat_template": path}}).values == {"dataset": {"chat_template": path}}


@pytest.mark.parametrize("mode", sorted(set(AUTOMODEL_MODES) - set(MODES)))
def test_a_mode_of_theirs_that_is_not_here_is_named_as_theirs_before_its_own_keys(mode: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(theirs(dllm__mode=mode, dllm__scdd={"uniform_ratio": 0.1}))
    assert str(caught.value) == (
        f"dllm.mode: {mode!r} is a mode of NeMo AutoModel that is not implemented here; set mdlm or block_diffusion"
    )
    with pytest.raises(FieldError, match="a mode of NeMo AutoModel that is not implemented here"):
        DllmConfig(mode=mode.upper())


def test_their_modes_that_are_here_are_ours() -> None:
    assert {"mdlm", "block_diffusion"} <= set(AUTOMODEL_MODES) & set(MODES)
