"""A model ends an answer as its run's template closes one: while it trains, loaded, as an adapter, exported, merged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from unmask.cli import main
from unmask.data.template_loading import load_template
from unmask.errors import ConfigError, DataError, ModelError
from unmask.models.folders import end_ids, read_generation
from unmask.models.manifest import MANIFEST, STATE
from unmask.models.tokenizer import load_tokenizer
from unmask.sampling.jobs import as_loaded, load
from unmask.sampling.plan import plan_job

REPORTS = Path(__file__).parent / "fixtures" / "reports"
EOS, MASK, EOT, START, END = 257, 261, 260, 262, 263
SAMPLER: dict[str, Any] = {"max_new_tokens": 8, "steps": 8, "block_size": 8}
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def chatml(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with ChatML's tokens, as a user adds them, and rows with short answers."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer = load_tokenizer(str(tiny.folder / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    rows = [[("user", f"{n % 2}?"), ("assistant", "NY"[n % 2])] for n in range(24)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def configuration(tiny: Any, chatml: Path, root: Path, **changes: Any) -> dict:
    rows = {"path_or_dataset_id": str(chatml / "rows.jsonl"), "tokenizer": str(chatml), "seq_length": 96}
    rows["chat_template"] = str(REPORTS / "chatml.jinja")
    fixed = {"dataset": rows, "step_scheduler__max_steps": 1, **changes}
    return tiny.config(root, **fixed)


@pytest.fixture(scope="module")
def trained(tiny, chatml: Path, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Any:
    values = configuration(tiny, chatml, tmp_path_factory.mktemp("trained"), step_scheduler__max_steps=60)
    values["step_scheduler"] |= {"global_batch_size": 12, "local_batch_size": 12}
    values["validation_dataset"] = dict(values["dataset"])
    values["validation"] = {"grader": "text", "max_samples": 6, "sampler": SAMPLER}
    values["optimizer"] = {"lr": 1e-2}
    values["dllm"] = {"mode": "mdlm", "supervise_padding": True}  # what follows an end is EOS, as in the prompts below
    return train_tiny(values)


def exact_match(run: Any) -> float:
    return next(event["exact_match"] for event in run.events if event["event"] == "exact_match")


def stored(folder: Path) -> list[int]:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_model_trained_in_another_form_stops_where_that_form_does(trained: Any, tmp_path: Path) -> None:
    assert exact_match(trained) == 1.0
    folder = trained.root / "latest"
    assert stored(folder) == [EOS, END]
    assert main(["export", "--checkpoint", str(trained.root), "--output", str(tmp_path / "plain")]) == 0
    for place in (folder, tmp_path / "plain"):
        model, tokenizer = unmask.load_model(str(place)), unmask.load_tokenizer(str(place))
        sampler = unmask.SamplerConfig(**SAMPLER)
        for question, answer in (("0?", "N"), ("1?", "Y")):
            (found,) = unmask.generate(model, question, tokenizer=tokenizer, sampler=sampler)
            assert (found.text, found.finish_reason) == (answer, "eos")
            assert found.token_ids == tokenizer.encode(answer, add_special_tokens=False)  # not on to the EOS behind it


def test_the_command_that_evaluates_stops_there_too(trained: Any, chatml: Path, tmp_path: Path) -> None:
    words = ["eval", "--checkpoint", str(trained.root), "--tasks", "text", "--data", str(chatml / "rows.jsonl")]
    flags = ["--limit", "6", "--max_new_tokens", "8", "--steps", "8", "--block_size", "8", "--device", "cpu"]
    assert main([*words, *flags, "--output", str(tmp_path / "out")]) == 0
    records = [
        json.loads(line) for path in (tmp_path / "out").rglob("*.jsonl") for line in path.read_text().splitlines()
    ]
    answers = [record for record in records if "finish_reason" in record]
    assert len(answers) == 6 and all(record["correct"] and record["finish_reason"] == "eos" for record in answers)


def test_transformers_reads_the_ends_that_are_stored(trained: Any) -> None:
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(trained.root / "latest").eos_token_id == [EOS, END]


def test_an_adapter_brings_its_ends_wherever_it_is_used(
    tiny, chatml: Path, tiny_base: Path, train_tiny: Train, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / MANIFEST).unlink()  # with them the change would be damage
    (base / STATE).unlink()
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, "bos_token_id": 256}))
    values = configuration(tiny, chatml, tmp_path / "run", peft={"r": 2})
    values["model"] = {"pretrained_model_name_or_path": str(base)}
    adapter = train_tiny(values).root
    assert json.loads((adapter / "latest" / "generation_config.json").read_text()) == {"eos_token_id": [257, 258, END]}
    merged = tmp_path / "merged"
    assert main(["export", "--checkpoint", str(base), "--adapter", str(adapter), "--output", str(merged)]) == 0
    assert read_generation(merged) == {"eos_token_id": [257, 258, END], "bos_token_id": 256}
    plan = plan_job(str(base), adapter=str(adapter))
    ends = (257, 258, END)
    on_top = unmask.load_model(str(base), adapter=str(adapter))
    assert load(plan, torch.device("cpu")).stop_ids == as_loaded(on_top, plan.tokenizer).stop_ids == ends
    assert as_loaded(on_top).stop_ids == ends  # also where prompts are token ids
    assert as_loaded(unmask.load_model(str(merged)), load_tokenizer(str(merged))).stop_ids == ends
    full = configuration(tiny, chatml, tmp_path / "full")
    full["model"] = values["model"]
    folder = train_tiny(full).root / "latest"
    assert read_generation(folder) == read_generation(merged)


def test_a_checkpoint_that_does_not_say_ends_as_its_template_does(trained: Any, chatml: Path) -> None:
    model: Any = unmask.load_model(str(trained.root))
    model.generation, tokenizer = {}, load_tokenizer(str(trained.root))
    loaded = as_loaded(model, tokenizer)
    assert loaded.stop_ids == (EOS, END)
    other = load_template(tokenizer, "llada", for_training=False)
    assert dataclasses.replace(loaded, template=other).stop_ids == (EOS, EOT)
    tokenizer.chat_template = None
    bare = as_loaded(model, tokenizer)
    assert bare.stop_ids == (EOS,) and bare.turn_ids == frozenset()
    assert unmask.generate(model, "0?", tokenizer=tokenizer, raw=True, sampler=unmask.SamplerConfig(**SAMPLER))
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert as_loaded(model, tokenizer).stop_ids == (EOS,)


def test_the_harness_ends_answers_as_the_template_that_it_is_told_to_apply(trained: Any) -> None:
    from unmask.evaluation.lm_eval import UnmaskLM

    model, tokenizer = unmask.load_model(str(trained.root)), load_tokenizer(str(trained.root))
    lm = UnmaskLM(model, tokenizer=tokenizer)
    assert lm.chat_template(True) == tokenizer.chat_template and lm.loaded.stop_ids == (EOS, END)
    lm.chat_template("llada")
    assert lm.loaded.stop_ids == (EOS, EOT, END)


@pytest.mark.parametrize("value", ["2", [1, "2"], 1.5, True, [-1], {"a": 1}])
def test_ends_that_are_no_ids_are_refused_by_file_and_field(value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelError, match="generation_config.json: eos_token_id: expected a token id, a list of them"):
        read_generation(tmp_path)


def test_ends_are_one_id_several_or_none() -> None:
    assert [end_ids({"eos_token_id": value}) for value in (7, [7, 0], None, [])] == [(7,), (7, 0), (), ()]
    assert end_ids({}) == ()


def test_an_end_that_could_never_be_written_is_refused(tiny, chatml: Path, train_tiny: Train, tmp_path: Path) -> None:
    small = {**tiny.model, "vocab_size": 262, "embedding_size": 272}
    with pytest.raises(
        ConfigError, match=f"'<.im_end.>', whose id {END} is beyond .* 262, .* set vocab_size .* to 264"
    ):
        train_tiny(configuration(tiny, chatml, tmp_path, model={"config": small}))


def test_a_turn_token_that_is_the_mask_is_refused(tiny, chatml: Path, train_tiny: Train, tmp_path: Path) -> None:
    model = {**tiny.model, "mask_token_id": START}
    with pytest.raises(ConfigError, match=r"writes '<.im_start.>', whose id 262 is the model's mask_token_id"):
        train_tiny(configuration(tiny, chatml, tmp_path, model={"config": model}))


def test_without_an_end_only_padding_teaches_to_stop(tiny, chatml: Path, train_tiny: Train, tmp_path: Path) -> None:
    source = (REPORTS / "chatml.jinja").read_text().replace(" + '<|im_end|>' }}{%- endgen", " }}{%- endgen")
    path = tmp_path / "endless.jinja"
    path.write_text(source)
    values = configuration(tiny, chatml, tmp_path / "run")
    values["dataset"]["chat_template"] = str(path)
    with pytest.raises(DataError, match="endless.jinja closes an answer with .* or set dllm.supervise_padding: true"):
        train_tiny(values)
    run = train_tiny({**values, "dllm": {"mode": "mdlm", "supervise_padding": True}})
    assert EOS in stored(run.root / "latest")
