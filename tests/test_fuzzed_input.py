"""Whatever stands in a configuration, a row or a model's folder is read, or refused by an error of ours in one line.

The fuzzers draw from fixed seeds; the cases of kinds that they, and people, once found stand in quick tests below and
in test_parsing.py.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from unmask.config import config_from_mapping, dump_config, load_config
from unmask.config.model import ModelConfig
from unmask.config.sampler import SamplerConfig
from unmask.data.conversation import RowProblem
from unmask.data.files import FileRows
from unmask.data.formats import NO_COLUMNS
from unmask.errors import UnmaskError
from unmask.evaluation.tasks import read_questions
from unmask.models.folders import INDEX, WEIGHTS, find_adapter, stored_tensors, weights_fingerprint
from unmask.models.loading import build_model
from unmask.models.lora.adapter_config import read_adapter_config
from unmask.models.registry import plan_folder, plan_model
from unmask.sampling.plan import plan_job
from unmask.sampling.prompts import read_prompts

CONFIG = {
    "model": {"config": {"model_type": "llada", "d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 300,
                         "mask_token_id": 299, "eos_token_id": 298, "pad_token_id": 298}, "torch_dtype": "float32"},
    "dataset": {"path_or_dataset_id": "rows.jsonl", "tokenizer": "t", "seq_length": 64, "answers": "all",
                "chat_template_kwargs": {"x": 1}, "ignore_keys": ["a"]},
    "validation_dataset": {"path_or_dataset_id": "valid.jsonl"},
    "step_scheduler": {"max_steps": 10, "global_batch_size": 4, "local_batch_size": 2, "val_every_steps": 5},
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0},
    "lr_scheduler": {"lr_decay_style": "cosine", "lr_warmup_steps": 2, "min_lr": 0.0},
    "dllm": {"mode": "mdlm", "eps": 0.001},
    "dataloader": {"num_workers": 0, "shuffle": True},
    "distributed": {"dp_size": 1},
    "peft": {"r": 4, "target_modules": ["*.q_proj"]},
    "checkpoint": {"checkpoint_dir": "run", "max_recent_checkpoints": 2},
    "seed": 1,
}  # fmt: skip
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}], "id": 1},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "x", "output": "b"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                  {"role": "assistant", "reasoning_content": "r", "content": "b", "tool_calls": [
                      {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]},
                  {"role": "tool", "content": "c", "tool_call_id": "1"}, {"role": "assistant", "content": "d"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
]  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"x": 2},
    "alpha_pattern": {}, "use_dora": False, "init_lora_weights": True, "layers_to_transform": [0], "bias": "none",
    "modules_to_save": None, "base_model_name_or_path": "b",
}  # fmt: skip
DEEP: Any = 1
for _ in range(400):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 10**15, -(10**30), 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "x", "\0",
    "~nosuchuser", "\ud83d", "😀", "x" * 10_000, [], {}, [[]], {"a": 1}, {1: 2}, {None: None}, [None], ["x"], [1.5],
    "2024-02-30", "1e400", "llada", "/dev/zero", "../x", b"\xff", (1, 2),
]  # fmt: skip
TEXTS = [
    "!!int x", "0x_", "[", "{", "]", "}", "&a", "*a", "<<: *a", "- ", ": ", "? ", "!!set", "!!binary x", "2024-02-30",
    "'", '"', '"\\ud83d"', "\t", "\n", "\0", "#", "|", ">", "%", "@", "`", "---\n", "...", "9" * 5000,
    "0x" + "f" * 5000, "!!python/name:os.system", "1:2:3", ".inf", ".nan", "NaN", "1e999", "[" * 3000, '{"a":' * 3000,
    "\ufeff", "é",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(value: Any, draw: random.Random, values: list[Any] = VALUES) -> Any:
    """Return a copy with a few values, or keys, replaced by others."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        container: Any
        container, key = draw.choice(list(places(value)) or [([0], 0)])
        if isinstance(container, dict) and draw.random() < 0.2:
            other = draw.choice(values)
            container[other if other.__hash__ and other == other else "x"] = container.pop(key)
        elif draw.random() < 0.1:
            del container[key]
        else:
            container[key] = copy.deepcopy(draw.choice(values))
    return value


def changed_text(text: str, draw: random.Random) -> str:
    for _ in range(draw.choice((1, 1, 2, 3))):
        start = draw.randrange(len(text) + 1)
        stop = min(len(text), start + draw.choice((0, 0, 1, 5, 40)))
        text = text[:start] + draw.choice(TEXTS) + text[stop:]
    return text


def changed_bytes(raw: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    sort = draw.randrange(4)
    if sort == 0:
        return raw[:start]
    if sort == 1:
        return raw[:start] + bytes([draw.randrange(256)]) + raw[start + 1 :]
    if sort == 2:
        return raw[:8] + changed_text(raw[8:].decode("latin-1"), draw).encode("latin-1", "replace")
    return draw.choice((0, 2**63, len(raw), 2**40)).to_bytes(8, "little") + raw[8:]


def holds(read: Callable[[], Any], case: object) -> None:
    """Check that something is read, or refused as it must be."""
    try:
        read()
    except (UnmaskError, RowProblem) as error:
        message = str(error)
        message.encode("utf-8", "backslashreplace")
        assert message and len(message) <= 2000, case
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error!s:.200}, of {case!r:.2000}", pytrace=False)


def read_config(values: Any) -> None:
    loaded = config_from_mapping(values)
    section = loaded.config.model
    if section.config is not None:
        plan_model(section)


GEMMA_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "max_position_embeddings", "sliding_window", "num_experts", "moe_intermediate_size",
)  # fmt: skip


@pytest.mark.parametrize("size", [10**15, 10**90, 2**30])
def test_sizes_are_checked_before_anything_is_made_of_them(size: int, gemma_values: Callable[..., dict]) -> None:
    llada = CONFIG["model"]["config"]
    names = ["d_model", "n_heads", "n_layers", "vocab_size", "embedding_size", "max_sequence_length", "n_kv_heads",
             "mlp_hidden_size", "mlp_ratio"]  # fmt: skip
    configs = [{**llada, name: size} for name in names]
    for name in GEMMA_SIZES:
        configs.append(gemma_values(**{name: size, "layer_types": None}))
    configs.append(gemma_values(canvas_length=size))
    for config in configs:
        with pytest.raises(UnmaskError, match="must be at most|must split into"):
            plan_model(ModelConfig(config=config))


def test_a_fresh_network_larger_than_the_memory_is_refused() -> None:
    plan = plan_model(ModelConfig(config={**CONFIG["model"]["config"], "d_model": 2**17, "n_layers": 100}))
    with pytest.raises(UnmaskError, match=r"weights take [\d,]+ GB, and this machine has"):
        build_model(plan, None)


@pytest.mark.parametrize(
    "values",
    [{"model_type": []}, {"model_type": {}}, {"architectures": 3}, {"architectures": [[]]}, {"d_model": "x"},
     {"mask_token_id": None}],
)  # fmt: skip
def test_fields_of_another_type_in_config_json_are_refused(values: dict) -> None:
    with pytest.raises(UnmaskError, match=next(iter(values))):
        plan_model(ModelConfig(config={**CONFIG["model"]["config"], **values}))


@pytest.mark.parametrize(
    "values",
    [{"r": "x"}, {"r": [1]}, {"r": None}, {"lora_alpha": "x"}, {"peft_type": []},
     {"rank_pattern": {"x": "y"}}, {"target_modules": 3}, {"use_dora": "x"}, {"layers_to_transform": ["x"]}],
)  # fmt: skip
def test_fields_of_another_type_in_adapter_config_are_refused(values: dict, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER, **values}))
    with pytest.raises(UnmaskError, match=next(iter(values))):
        read_adapter_config(tmp_path)


def test_what_a_refusal_prints_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "seed": ["x" * 100] * 10_000}))
    with pytest.raises(UnmaskError, match=r"^seed: expected an integer, got \['x") as caught:
        load_config(path)
    assert len(str(caught.value)) <= 2000


def test_a_length_beyond_the_model_is_refused_before_its_blocks_are_counted(fixtures: Path) -> None:
    with pytest.raises(UnmaskError, match="max_new_tokens: 9+ tokens are over"):
        plan_job(str(fixtures / "llada_tiny"), SamplerConfig(max_new_tokens=int("9" * 18)))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_configurations_are_read_or_refused(tmp_path: Path) -> None:
    draw, path = random.Random(1), tmp_path / "run.yaml"
    read_config(CONFIG)
    for _ in range(18_000):
        values = changed(CONFIG, draw)
        holds(lambda values=values: read_config(values), values)
    text = yaml.safe_dump({name: CONFIG[name] for name in ("model", "dataset", "step_scheduler", "optimizer")})
    for _ in range(2_000):
        made = changed_text(text, draw)
        path.write_text(made, encoding="utf-8")
        holds(lambda: dump_config(load_config(path).config), made)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_rows_are_read_or_refused(tmp_path: Path) -> None:
    draw = random.Random(2)
    values = [value for value in VALUES if not isinstance(value, (bytes, tuple))] + [DEEP]
    for number in range(200):
        lines = []
        for _ in range(100):
            row = draw.choice(ROWS)
            text = json.dumps(changed(row, draw, values))
            lines.append((changed_text(text, draw) if draw.random() < 0.3 else text).replace("\n", " ") + "\n")
        for name in ("rows.jsonl", "rows.json"):
            path = tmp_path / name
            path.write_text("".join(lines) if name == "rows.jsonl" or number % 2 else f"[{','.join(lines)}]", "utf-8")

            def read(path: Path = path) -> None:
                rows = FileRows(path, NO_COLUMNS, "dataset", skip_malformed=True)
                for index in range(len(rows)):
                    holds(partial(rows.__getitem__, index), str(path))

            holds(read, lines)
        path = tmp_path / "one.jsonl"
        for line in lines[:10]:
            path.write_text(line, "utf-8")
            holds(partial(read_prompts, path), line)
            holds(partial(read_questions, path), line)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_folders_are_read_or_refused(tmp_path: Path, fixtures: Path, gemma_values: Callable[..., dict]) -> None:
    draw, folder, adapter = random.Random(3), tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(fixtures / "llada_tiny", folder)
    adapter.mkdir()
    config = json.loads((folder / "config.json").read_text())
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.ones(2, np.float16)}, folder / WEIGHTS)
    weights = (folder / WEIGHTS).read_bytes()
    index = {"weight_map": dict.fromkeys(stored_tensors(folder), "part.safetensors")}
    values = [value for value in VALUES if not isinstance(value, (bytes, tuple))] + [DEEP]

    def write(path: Path, value: Any) -> str:
        text = json.dumps(value)
        text = changed_text(text, draw) if draw.random() < 0.2 else text
        path.write_text(text, "utf-8")
        return text

    for number in range(5_000):
        case: object
        if number % 4 == 0:
            case = write(folder / "config.json", changed(draw.choice((config, gemma_values())), draw, values))
            holds(lambda: plan_folder(str(folder), "checkpoint"), case)
            write(folder / "config.json", config) if number % 8 else None
        elif number % 4 == 1:
            case = write(adapter / "adapter_config.json", changed(ADAPTER, draw, values))
            (adapter / "adapter_model.safetensors").touch()
            holds(lambda: read_adapter_config(find_adapter(adapter)), case)
        elif number % 4 == 2:
            case = changed_bytes(weights, draw)
            (folder / WEIGHTS).write_bytes(case)
            holds(lambda: (stored_tensors(folder), weights_fingerprint(folder)), case)
            (folder / WEIGHTS).unlink()
        else:
            (folder / "part.safetensors").write_bytes(weights)
            case = write(folder / INDEX, changed(index, draw, values))
            holds(lambda: stored_tensors(folder), case)
            (folder / INDEX).unlink()
            (folder / WEIGHTS).write_bytes(weights)
