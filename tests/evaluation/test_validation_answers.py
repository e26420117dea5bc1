"""Exact match while training: it is measured as `unmask eval` would, and changes nothing of what is learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.errors import ConfigError, DataError
from unmask.evaluation.tasks import questions_of

Train = Callable[..., Any]
SAMPLER = {"steps": 4, "max_new_tokens": 16, "block_size": 16}


def config(tiny: Any, root: Path, **changes: Any) -> dict:
    fixed: dict[str, Any] = {
        "validation_dataset": tiny.validation(),
        "step_scheduler__ckpt_every_steps": 2,
        "validation": {"generate_every_steps": 2, "max_samples": 3, "sampler": SAMPLER, "keep_samples": 2},
    }
    return tiny.config(root, **{**fixed, **changes})


def events(run: Any, kind: str) -> list[dict]:
    return [{k: v for k, v in e.items() if k not in ("time", "seconds")} for e in run.events if e["event"] == kind]


def samples(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def answered(tiny, tiny_base: Path, train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with dropout, so that torch's global generator is in use, and a metric that follows the answers."""
    root = tmp_path_factory.mktemp("answered")
    return train_tiny(config(tiny, root, **adapter(tiny_base), checkpoint__best_metric="exact_match"))


def adapter(base: Path) -> dict[str, Any]:
    return {"model": {"pretrained_model_name_or_path": str(base)}, "peft": {"r": 2, "lora_dropout": 0.3}}


def test_answers_are_counted_and_kept(answered: Any, tiny) -> None:
    found = events(answered, "exact_match")
    assert [event["step"] for event in found] == [2, 4, 6]
    assert all(event["total"] == 3 and event["exact_match"] == event["right"] / 3 for event in found)
    assert [event["step"] for event in events(answered, "validation")] == [6]
    kept = samples(answered.root)
    assert [sample["step"] for sample in kept] == [2, 2, 4, 4, 6, 6]
    rows = [json.loads(line)["messages"] for line in (tiny.folder / "valid.jsonl").read_text().splitlines()]
    assert [kept[0]["prompt"], kept[0]["reference"]] == [turn["content"] for turn in rows[0]]
    assert kept[0]["row"].endswith("valid.jsonl:1") and isinstance(kept[0]["correct"], bool)


def test_an_approximate_sampler_is_labelled(tiny, train_tiny: Train, tmp_path: Path) -> None:
    section = {"generate_every_steps": 1, "max_samples": 1, "sampler": {**SAMPLER, "cache": "dual"}}
    run = train_tiny(config(tiny, tmp_path, validation=section, step_scheduler__max_steps=1))
    assert "validation: approximate sampling: dual cache, computed anew at block starts" in run.output


def test_the_run_learns_the_same_without_it(answered: Any, tiny, tiny_base: Path, train_tiny: Train, tmp_path: Path):
    plain = train_tiny(config(tiny, tmp_path, **adapter(tiny_base), validation=None))
    assert plain.losses == answered.losses
    assert events(plain, "validation") == events(answered, "validation")
    weights = [(run.root / "latest" / "adapter_model.safetensors").read_bytes() for run in (plain, answered)]
    assert weights[0] == weights[1]


def test_a_resumed_run_measures_what_a_whole_one_does(
    answered: Any, tiny, tiny_base: Path, train_tiny: Train, tmp_path: Path
) -> None:
    values = config(tiny, tmp_path, **adapter(tiny_base), checkpoint__best_metric="exact_match")
    train_tiny({**values, "step_scheduler": {**values["step_scheduler"], "max_steps": 3}})
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"event": "sample", "step": 5}) + "\n")
    resumed = train_tiny(values)
    assert resumed.losses == answered.losses
    final = [event for event in events(resumed, "exact_match") if event["step"] % 2 == 0]
    assert final == events(answered, "exact_match")
    assert [s for s in samples(tmp_path) if s["step"] % 2 == 0] == samples(answered.root)
    assert resumed.outcome.best == answered.outcome.best


def test_the_share_is_what_the_scorer_says(answered: Any, tiny, tiny_base: Path) -> None:
    import unmask
    from unmask.config.data import DatasetConfig
    from unmask.config.sampler import SamplerConfig
    from unmask.data.sources import open_rows
    from unmask.evaluation.exact_match import score_answers
    from unmask.rng import key

    model = unmask.load_model(str(tiny_base), adapter=str(answered.root / "step_6"))
    tokenizer = unmask.load_tokenizer(str(answered.root / "step_6"))
    rows = questions_of(open_rows(DatasetConfig(str(tiny.folder / "valid.jsonl"))), 3)
    seed = key(42, "validation/answers") % 2**63
    scored = score_answers(model, rows, tokenizer=tokenizer, sampler=SamplerConfig(**SAMPLER), seed=seed)
    assert [answer.text for answer in scored.answers[:2]] == [s["text"] for s in samples(answered.root)[-2:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_dataset": None}, "validation: answers rows of validation_dataset, and there is none"),
        ({"validation__max_samples": 0}, "validation.max_samples: must be at least 1, or null, got 0"),
        ({"validation__keep_samples": -1}, "validation.keep_samples: must not be negative"),
        ({"validation__grader": "numbr"}, "'numbr' is not one of number, text, expression (did you mean 'number'?)"),
        ({"validation__sampler": {"step": 4}}, "validation.sampler: 'step' is not one of"),
        ({"validation__sampler": {"steps": 0}}, "validation.sampler: steps: must be an integer of at least 1"),
        ({"validation__generate_every": 5}, "validation.generate_every: unknown key (did you mean"),
        ({"validation__sampler": {"entropy_bound": 0.1, "t_min": 0.5}}, "validation.sampler: t_min: LLaDA"),
        (
            {"validation__sampler": {"max_new_tokens": 90, "steps": 4}},
            "make 124, over the model's max_sequence_length 96",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tiny, train_tiny, tmp_path, changes: dict, message: str):
    values = config(tiny, tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        train_tiny(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_that_asks_nothing_is_named(tmp_path: Path) -> None:
    from unmask.config.data import DatasetConfig
    from unmask.data.sources import open_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "hello"}]}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: nothing is asked"):
        questions_of(open_rows(DatasetConfig(str(path))), None)
