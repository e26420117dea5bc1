"""`unmask eval` from the command line: full models and adapters side by side, interrupted, refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.evaluation.exact_match import TaskRun

SHORT = ["--max-new-tokens", "8", "--steps", "4", "--block-size", "8", "--batch-size", "2"]


@pytest.fixture(scope="module")
def adapter(tiny, train_tiny, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny.config(tmp_path_factory.mktemp("adapter"), peft={"r": 2}, step_scheduler__max_steps=1)
    values["model"] = {"pretrained_model_name_or_path": str(tiny_base)}
    values["optimizer"]["lr"] = 1.0  # so that it changes something
    return train_tiny(values).root


@pytest.fixture
def evaluate(tiny, tiny_base: Path, tmp_path: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `unmask eval` on ten rows; gives its status, what it printed, and its errors."""

    def run(*words: str, checkpoint: str | None = None, data: str | None = None) -> tuple[int, str, str]:
        path = data or str(tiny.folder / "train.jsonl")
        if not (tmp_path / "model").exists():
            (tmp_path / "model").symlink_to(tiny_base)
        flags = ["--tasks", "gsm8k", "--data", path, "--limit", "10", "--output", str(tmp_path / "out"), *SHORT]
        status = main(["eval", "--checkpoint", checkpoint or str(tmp_path / "model"), *flags, *words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def answers(folder: Path, name: str = "gsm8k-model.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()[1:]]


def test_a_base_and_its_adapter_stand_side_by_side(evaluate, tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    second = ["--checkpoint", str(tiny_base), "--adapter", str(adapter)]
    status, printed, _ = evaluate(*second, "--tasks", "gsm8k,likelihood", "--num-samples", "4")
    assert status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = [model["label"] for model in results["models"]]
    assert [model["adapter"] is None for model in results["models"]] == [True, False] and labels[0] != labels[1]
    found = {(each["task"], each["model"]): each for each in results["results"]}
    assert set(found) == {(task, label) for task in ("gsm8k", "likelihood") for label in labels}
    base, tuned = (found["likelihood", label]["nats_per_token"] for label in labels)
    assert base > 0 and abs(base - tuned) > 0.01
    assert found["gsm8k", labels[1]]["compared"]["first"]["rows"] == 10
    for words in ("exact match", "95 % interval", "bound, nats a token", "10 of 10"):
        assert words in printed
    for each in results["results"]:
        assert len(answers(tmp_path / "out", each["file"])) == 10


def test_an_approximate_sampler_is_labelled(evaluate, tmp_path: Path) -> None:
    status, printed, _ = evaluate("--limit", "2", "--cache", "dual")
    note = "dual cache, computed anew at block starts"
    assert status == 0 and f"model: approximate sampling: {note}" in printed
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["settings"]["approximations"][0] == note


def test_a_table_that_goes_into_a_file_is_as_wide_as_it_needs_to_be(evaluate, tiny_base, tmp_path, monkeypatch) -> None:
    names = [tmp_path / (letter * 40) for letter in "ab"]
    for name in names:
        name.symlink_to(tiny_base)
    words = ["--checkpoint", str(names[1]), "--limit", "2"]
    status, printed, _ = evaluate(*words, checkpoint=str(names[0]))
    lines = printed.splitlines()
    head = next(line for line in lines if "measure" in line)
    assert status == 0 and all(name.name in head for name in names) and len({len(line) for line in lines[2:-1]}) == 1
    assert any(line.startswith(f"gsm8k, {names[0].name}: 2 of 2") for line in lines)
    monkeypatch.setenv("COLUMNS", "100")
    status, printed, _ = evaluate(*words, checkpoint=str(names[0]))
    assert status == 0 and max(map(len, printed.splitlines()[2:-1])) == 100


def test_an_interrupted_evaluation_goes_on_and_ends_as_it_would_have(evaluate, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("unmask.evaluation.exact_match.BATCHES_BETWEEN_SAVES", 2)
    assert evaluate()[0] == 0
    path = tmp_path / "out" / "gsm8k-model.jsonl"
    whole = path.read_bytes()
    path.unlink()
    answer, calls = TaskRun.answer, []

    def interrupted(self, chunk):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(chunk.rows)
        return answer(self, chunk)

    monkeypatch.setattr(TaskRun, "answer", interrupted)
    assert evaluate()[0] == 130
    assert len(answers(tmp_path / "out")) == 8
    calls[:] = calls[:1]  # one more chunk may be answered
    assert evaluate()[0] == 0
    assert path.read_bytes() == whole
    assert evaluate()[0] == 0  # nothing is left to do, so no chunk is answered


@pytest.mark.parametrize("limit", ["3", "11"])
def test_another_limit_is_another_evaluation(limit: str, evaluate, tmp_path: Path) -> None:
    tasks = ["--tasks", "gsm8k,likelihood", "--num-samples", "4"]
    assert evaluate(*tasks)[0] == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for task in ("gsm8k", "likelihood"):
        words = ["--tasks", task, *(tasks[2:] if task == "likelihood" else []), "--limit", limit]
        status, _, errors = evaluate(*words)
        assert status == 2 and errors.count("\n") == 1
        assert f"{task}-model.jsonl: holds another evaluation (rows 10, not {limit}); choose another --out" in errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_two_runs_leave_the_same_bytes_and_another_batch_size_the_same_answers(evaluate, tmp_path: Path) -> None:
    first, second, third = (str(tmp_path / name) for name in "abc")
    tasks = ["--tasks", "gsm8k", "likelihood", "--num-samples", "4", "--temperature", "0.7"]
    for words in ([first], [second], [third, "--batch-size", "5", "--against", first]):
        assert evaluate(*tasks, "--output", *words)[0] == 0
    for name in ("gsm8k-model.jsonl", "likelihood-model.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    compared = json.loads((tmp_path / "c" / "results.json").read_text())["results"][0]["compared"]
    assert compared == {"against": {"rows": 10, "differing": 0, "gained": 0, "lost": 0}}

    # What cannot be compared is refused before a model loads.
    status, _, errors = evaluate("--output", third, "--against", first, "--temperature", "0.5")
    assert status == 2 and "gsm8k-model.jsonl is of another evaluation (sampler.temperature 0.7, not 0.5)" in errors
    status, _, errors = evaluate("--tasks", "text", "--output", third, "--against", first)
    assert status == 2 and "text-model.jsonl is not there" in errors


def test_a_second_command_adds_to_the_results(evaluate, tmp_path: Path) -> None:
    def results() -> dict[str, dict]:
        return {each["task"]: each for each in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}

    short = ["--limit", "3"]
    assert evaluate(*short)[0] == 0
    first = results()["gsm8k"]
    assert first["settings"]["sampler"]["steps"] == 4 and first["timed_rows"] == 3 and first["batch_size"] == 2
    assert evaluate(*short, "--tasks", "likelihood", "--num-samples", "4")[0] == 0
    both = results()
    assert list(both) == ["gsm8k", "likelihood"] and both["gsm8k"] == first
    assert both["likelihood"]["settings"]["num_samples"] == 4
    status, printed, _ = evaluate(*short, "--batch-size", "3")
    assert status == 0 and "gsm8k, model: all 3 were there already" in printed
    assert results()["gsm8k"] == first
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    values["models"][0]["fingerprint"]["weights"] = "of another model"
    (tmp_path / "out" / "results.json").write_text(json.dumps(values))
    status, _, errors = evaluate(*short)
    assert status == 2 and "results.json: model is another model there" in errors


def test_a_refused_command_leaves_no_file_behind(evaluate, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "why? " * 40, "answer": "3"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, errors = evaluate(data=str(path))
    assert status == 2 and "rows.jsonl:2: " in errors and "over the model's max_sequence_length" in errors
    assert not (tmp_path / "out").exists()


def test_literal_text_is_in_the_form_of_each_task(evaluate, tmp_path: Path, monkeypatch) -> None:
    asked = {}

    def answer(self, chunk):
        asked.setdefault(self.stops[0], self.questions[0].prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(TaskRun, "answer", answer)
    for task in ("gsm8k,math", "math,gsm8k"):
        evaluate("--raw", "--tasks", task, "--output", str(tmp_path / task))
    assert asked["Question:"].startswith("Question: ") and asked["Problem:"].startswith("Problem: ")


def test_another_evaluation_is_not_mixed_into_a_file(evaluate, tmp_path: Path) -> None:
    assert evaluate()[0] == 0
    before = (tmp_path / "out" / "gsm8k-model.jsonl").read_bytes()
    status, _, errors = evaluate("--steps", "5")
    assert status == 2 and "gsm8k-model.jsonl: holds another evaluation (sampler.steps 4, not 5)" in errors
    assert evaluate("--steps", "5", "--seed", "1", "--output", str(tmp_path / "other"))[0] == 0
    assert (tmp_path / "out" / "gsm8k-model.jsonl").read_bytes() == before


def test_worked_examples_and_literal_text_reach_the_model(evaluate, tiny, tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    said = {}
    for name, words in {"none": [], "shot": ["--few-shot", "1", "--shots-file", str(shots)], "raw": ["--raw"]}.items():
        assert evaluate("--output", str(tmp_path / name), "--limit", "2", *words)[0] == 0
        said[name] = json.loads((tmp_path / name / "gsm8k-model.jsonl").read_text().splitlines()[0])["evaluation"]
    assert len({each["questions"] for each in said.values()}) == 3
    assert said["raw"]["stops"] == ["Question:", "\n\n\n"] and said["shot"]["stops"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", ","], "--tasks: names no task"),
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--few-shot", "2"], "--shots_file: 2 worked examples"),
        (["--shots-file", "x.jsonl"], "--shots_file: no worked examples are asked"),
        (["--prompt-column", "q"], "--completion_column: give both"),
        (["--prompt-column", "q", "--completion-column", "a"], "train.jsonl:1: no column 'q'"),
        (["--include-path", "."], "--include_path: is of lm-evaluation-harness"),
        (["--against", "nowhere"], "--against: nowhere is no folder"),
        (["--adapter", "a", "--adapter", "b"], "--adapter: b belongs to no checkpoint"),
        (["--data", "nowhere.jsonl"], "--data: "),
        (["--entropy-bound", "0.1", "--threshold", "0.9"], "cannot be set together"),
        (["--t-min", "0.1"], "t_min"),
        (["--tasks", "likelihood", "--num-samples", "3", "--antithetic"], "--num_samples: must be even with"),
        (["--num-samples", "3"], "--num_samples: is of likelihoods"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(evaluate, words: list[str], said: str) -> None:
    status, _, errors = evaluate(*words)
    assert status == 2
    assert said in errors and errors.count("\n") == 1 and "Traceback" not in errors


def test_an_unknown_task_gets_the_nearest_name_of_ours_and_theirs(evaluate, monkeypatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: argparse.Namespace(all_tasks=["hellaswag"]))
    status, _, errors = evaluate("--tasks", "gsm8k,helaswag")
    assert status == 2 and "'helaswag' is neither one of gsm8k, math, text, likelihood nor a task of lm-eval" in errors
    assert "did you mean 'hellaswag'?" in errors and errors.count("\n") == 1


def test_what_is_wrong_is_said_before_the_harness_reads_its_tasks(evaluate, monkeypatch) -> None:
    def slow(**_: object) -> None:
        raise AssertionError("the harness was asked")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", slow)
    status, _, errors = evaluate("--tasks", "gsm9k")
    assert status == 2 and "did you mean 'gsm8k'?" in errors and errors.count("\n") == 1
    assert "nowhere" in evaluate("--tasks", "gsm8k,hellaswag", "--data", "nowhere.jsonl")[2]
    assert "--checkpoint" in evaluate("--tasks", "gsm8k,hellaswag", checkpoint="no/such/folder")[2]


def test_without_the_harness_the_install_command_is_named(evaluate, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, errors = evaluate("--tasks", "hellaswag")
    assert status == 2 and "pip install 'unmask[eval]'" in errors and errors.count("\n") == 1


def test_a_checkpoint_without_a_tokenizer_is_refused_before_it_loads(evaluate, tiny_base: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    status, _, errors = evaluate(checkpoint=str(bare))
    assert status == 2 and "has no tokenizer" in errors and not (tmp_path / "out").exists()


def test_rows_that_no_model_could_answer_are_refused_with_their_line(evaluate, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "How many?", "answer": "many"}\n')
    status, _, errors = evaluate(data=str(path))
    assert status == 2 and "rows.jsonl:2: the answer has no number in it" in errors
    path.write_text('{"question": "1 + 1?"}\n')
    status, _, errors = evaluate(data=str(path))
    assert status == 2 and "rows.jsonl:1: neither messages nor a pair of columns" in errors


def test_keys_of_rows_are_refused_left_out_or_listed_as_in_training(evaluate, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "Reverse", "input": "12", "output": "21", "label": True, "id": 7}
    path.write_text(json.dumps(row) + "\n")
    status, _, errors = evaluate(data=str(path))
    assert status == 2 and "rows.jsonl:1: the row has 'label'" in errors and "--ignore-keys label" in errors
    status, printed, _ = evaluate("--ignore-keys", "label", data=str(path))
    assert status == 0 and "1 rows have the key 'id', which nothing reads" in " ".join(printed.split())
    assert answers(tmp_path / "out")[0]["reference"] == "21"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_share_the_rows_and_give_the_same_results(evaluate, tmp_path: Path) -> None:
    """Batches of one row, so that not even rounding differs."""
    tasks = ["--tasks", "gsm8k,likelihood", "--num-samples", "4", "--batch-size", "1"]
    assert evaluate(*tasks)[0] == 0
    assert evaluate(*tasks, "--output", str(tmp_path / "two"), "--nproc-per-node", "2")[0] == 0
    for name in ("gsm8k-model.jsonl", "likelihood-model.jsonl"):
        one, two = (sorted(answers(tmp_path / folder, name), key=lambda row: row["row"]) for folder in ("out", "two"))
        assert one == two
