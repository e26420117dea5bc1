"""Mistakes of the user: exit status 2, one line that names what and where, nothing written, within two seconds.

`refused` is a real process for one command line, `all_refused` one process for many; in both the mistake must be
reported before torch is imported. `refused_here` is for what torch must load for.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.cli import main

SCRIPT = (
    "import sys\n"
    "from unmask.cli import main\n"
    "status = main(sys.argv[1:])\n"
    "print('torch' in sys.modules, file=sys.stdout)\n"
    "sys.exit(status)\n"
)


# As SCRIPT, for a JSON list of command lines; prints for each its status, message, and whether torch was imported.
MANY = (
    "import contextlib, io, json, sys, time\n"
    "from unmask.cli import main\n"
    "for words in json.loads(sys.argv[1]):\n"
    "    out, err, started = io.StringIO(), io.StringIO(), time.process_time()\n"
    "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
    "        status = main(words)\n"
    "    seconds = time.process_time() - started\n"
    "    print(json.dumps([status, out.getvalue(), err.getvalue(), 'torch' in sys.modules, seconds]))\n"
)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_message(said: str) -> None:
    assert said.startswith("unmask: error: ") and said.count("\n") == 1, said


def refused(folder: Path, words: list[str], **environment: str) -> str:
    """Run `unmask WORDS` in `folder`, check that it is refused as it should be, and return its message."""
    before, started = listing(folder), cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    seconds = cpu_seconds() - started
    assert done.returncode == 2, (done.stdout, done.stderr)
    check_message(done.stderr)
    assert listing(folder) == before
    assert done.stdout == "False\n" and seconds < 2
    return done.stderr


@pytest.fixture
def refused_here(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], str]:
    """As `refused`, within this process, which has torch."""

    def check(words: list[str]) -> str:
        before = listing(place)
        monkeypatch.chdir(place)
        assert main(words) == 2
        out, said = capsys.readouterr()
        check_message(said)
        assert out == "" and listing(place) == before
        return said

    return check


def all_refused(folder: Path, cases: list[tuple[list[str], list[str]]]) -> None:
    """Check that each (command line, words of its message) is refused without torch and without a trace."""
    before = listing(folder)
    words = json.dumps([words for words, _ in cases])
    done = subprocess.run([sys.executable, "-c", MANY, words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (words, named), (status, out, said, torch_loaded, seconds) in zip(cases, results, strict=True):
        case = f"unmask {' '.join(words)}: {said}"
        assert (status, out) == (2, ""), case
        check_message(said)
        assert [word for word in named if word not in said] == [], case
        assert not torch_loaded and seconds < 1.5, case
    assert listing(folder) == before


@pytest.fixture
def place(tmp_path: Path, tiny) -> Path:
    """A folder with a configuration that works, run.yaml, its data, and a checkpoint."""
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copy(tiny.folder / name, tmp_path / name)
    tiny.write(tmp_path / "run.yaml", tiny.config(Path("run"), dataset__path_or_dataset_id="train.jsonl"))
    return tmp_path


TRAIN = ["train", "-c", "run.yaml"]


TRAIN_CASES: list[tuple[list[str], list[str]]] = [
    (["--optimizer.lrr", "1"], ["optimizer.lrr", "unknown key", "did you mean 'lr'"]),
    (["--optimzer.lr", "1"], ["optimzer", "did you mean 'optimizer'"]),
    (["--optimizer.lr", "fast"], ["optimizer.lr", "'fast'"]),
    (["--optimizer.lr"], ["--optimizer.lr", "a value must follow"]),
    (["--step_scheduler.global_batch_size", "3"], ["step_scheduler.global_batch_size", "3"]),
    (["--step_scheduler.global_batch_size", "400"], ["step_scheduler.global_batch_size", "24 rows"]),
    (["--dataset.unshifted", "false"], ["dataset.unshifted"]),
    (["--dataset.seq_length", "97"], ["dataset.seq_length", "97", "96"]),
    (["--dllm.mask_token_id", "264"], ["dllm.mask_token_id", "264", "vocabulary of 264"]),
    (["--dllm.mask_token_id", "5"], ["dllm.mask_token_id", "5", "261"]),
    (["--model.config.mask_token_id", "264"], ["model.config", "mask_token_id=264"]),
    (["--model.config.n_headss", "2"], ["model.config", "n_headss", "n_heads"]),
    (["--model.config.model_type", "lama"], ["model_type", "'lama'", "llada"]),
    (["--dataset.path_or_dataset_id", "nowhere.jsonl"], ["dataset.path_or_dataset_id", "nowhere.jsonl"]),
    (["--dataset.tokenizer", "nowhere"], ["dataset.tokenizer", "nowhere"]),
    (["--model.config", "null"], ["model.pretrained_model_name_or_path"]),
    (
        ["--model.config", "null", "--model.pretrained_model_name_or_path", "./nowhere"],
        ["model.pretrained_model_name_or_path", "nowhere"],
    ),
    (["--checkpoint.checkpoint_dir", "train.jsonl"], ["checkpoint.checkpoint_dir", "train.jsonl"]),
    (["--wandb.tracker", "trackio"], ["wandb.tracker", "pip install 'unmask[trackio]'"]),
    (["--peft.r", "2"], ["peft", "an adapter needs a base checkpoint", "model.pretrained_model_name_or_path"]),
    (["--nproc-per-node", "0"], ["--nproc-per-node", "at least 1", "0"]),
    (["--nproc_per_node", "two"], ["nproc", "two"]),
    (["--nproc-per-node", "3"], ["step_scheduler.global_batch_size", "3 processes"]),
    (["--nproc-per-node", "2", "--distributed.dp_size", "4"], ["distributed.dp_size: 4", "2 processes"]),
    (["--nproc-per-node", "2", "--distributed.dp_replicate_size", "3"], ["dp_replicate_size: 3", "does not divide"]),
    (["--distributed.dp_replicate_size", "2"], ["distributed.dp_replicate_size: 2", "1 process"]),
    (["--distributed.ep_size", "2"], ["distributed.ep_size: 2", "no experts"]),
    (["--distributed.tp_size", "2"], ["distributed.tp_size: 2 is not available", "tensor", "set it to 1"]),
    (["--distributed.cp_size", "2"], ["distributed.cp_size: 2 is not available", "context"]),
    (["--distributed.pp_size", "2"], ["distributed.pp_size: 2 is not available", "pipeline"]),
    (["--distributed.strategy", "ddp2"], ["distributed.strategy", "fsdp2"]),
    (["--distributed.offload_policy", "cpu"], ["distributed.offload_policy", "more than one process"]),
    (["--distributed.timeout_minutes", "0"], ["distributed.timeout_minutes", "positive"]),
    (["--distributed.mp_policy", "{reduce_dtype: float16}"], ["distributed.mp_policy.reduce_dtype", "bfloat16"]),
    (["--checkpoint.save_consolidated", "always"], ["checkpoint.save_consolidated", "final"]),
]


def test_train(place: Path) -> None:
    all_refused(place, [([*TRAIN, *overrides], named) for overrides, named in TRAIN_CASES])


def test_a_hub_id_that_is_not_there(refused_here: Callable[[list[str]], str]) -> None:
    said = refused_here([*TRAIN, "--dataset.path_or_dataset_id", "data/rows"])
    assert "dataset.path_or_dataset_id" in said and "data/rows" in said


ROWS: list[tuple[bytes, list[str]]] = [
    (b'{"text": "no messages"}\n', ["messages"]),
    (b'{"messages": []}\n', []),
    (b'{"messages": [{"role": "robot", "content": "x"}]}\n', ["robot"]),
    (b'{"messages": [{"role": "user", "content": "x"}]}\n', ["assistant"]),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', ["UTF-8"]),
    (b'{"messages": [{"role": "user"\n', []),
    (
        b'{"image": "x.png", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
        ["image"],
    ),
]


def test_malformed_rows(place: Path) -> None:
    good = (place / "train.jsonl").read_bytes().split(b"\n")
    cases = []
    for number, (content, named) in enumerate(ROWS):
        name = f"rows{number}.jsonl"
        (place / name).write_bytes(b"\n".join(good[:2]) + b"\n" + content + b"\n".join(good[2:]))
        cases.append(([*TRAIN, "--dataset.path_or_dataset_id", name], [f"{name}:3: ", *named]))
    all_refused(place, cases)


def test_a_configuration_file(place: Path) -> None:
    files = {"model: [": "not valid YAML", "seed: 1\nseed: 2\n": "'seed' is given twice", "": "expected sections"}
    cases = [(["train", "-c", "missing.yaml"], ["missing.yaml", "cannot be read"])]
    for number, (text, named) in enumerate(files.items()):
        (place / f"bad{number}.yaml").write_text(text)
        cases.append((["train", "-c", f"bad{number}.yaml"], [f"bad{number}.yaml", named]))
    all_refused(place, cases)


def test_variables_of_a_launcher_that_are_wrong(place: Path) -> None:
    for value in ("many", "0", "-1"):
        assert "WORLD_SIZE" in refused(place, TRAIN, WORLD_SIZE=value)


def test_a_tracker_that_is_only_a_folder_of_its_own_logs(place: Path) -> None:
    (place / "trackio").mkdir()
    words = [*TRAIN, "--wandb.tracker", "trackio"]
    assert "pip install 'unmask[trackio]'" in refused(place, words, PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}:.")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny, train_tiny: Callable) -> Path:
    root = tmp_path_factory.mktemp("trained")
    return train_tiny(tiny.config(root, step_scheduler__max_steps=1)).root / "step_1"


@pytest.fixture
def checkpoint(place: Path, trained: Path) -> Path:
    """A whole checkpoint, `model`, beside the configuration."""
    shutil.copytree(trained, place / "model")
    return place / "model"


GENERATE = ["generate", "--checkpoint", "model", "--prompt", "hi"]


OTHER_CASES: list[tuple[list[str], list[str]]] = [
    (["generate", "--checkpoint", "./nowhere", "--prompt", "hi"], ["--checkpoint", "nowhere"]),
    (["generate", "--checkpoint", "train.jsonl", "--prompt", "hi"], ["--checkpoint", "is a file"]),
    (["generate", "--checkpoint", "empty", "--prompt", "hi"], ["--checkpoint", "not a checkpoint"]),
    (["generate", "--checkpoint", "model", "--prompt", " "], ["--prompt", "empty"]),
    (["generate", "--checkpoint", "model"], ["--prompt"]),
    ([*GENERATE, "--steps", "0"], ["steps", "at least 1"]),
    ([*GENERATE, "--steps", "many"], ["--steps", "many"]),
    ([*GENERATE, "--max-new-tokens", "0"], ["max_new_tokens"]),
    ([*GENERATE, "--block-size", "0"], ["block_size"]),
    ([*GENERATE, "--temperature", "-1"], ["temperature"]),
    ([*GENERATE, "--remasking", "low_confidance"], ["remasking", "did you mean 'low_confidence'"]),
    ([*GENERATE, "--eos", "never"], ["eos", "allow, suppress, defer"]),
    ([*GENERATE, "--batch-size", "0"], ["batch_size"]),
    ([*GENERATE, "--stepz", "4"], ["--stepz"]),
    ([*GENERATE, "--step", "4"], ["--step"]),
    ([*GENERATE, "--output", "missing/out.jsonl"], ["--output", "missing"]),
    ([*GENERATE, "--output", "model"], ["--output", "folder"]),
    ([*GENERATE, "--adapter", "empty"], ["adapter", "empty"]),
    ([*GENERATE, "--dtype", "int8"], ["--dtype", "int8"]),
    (["export", "--checkpoint", "model", "--output", "full"], ["--output", "not empty"]),
    (["export", "--checkpoint", "model", "--output", "train.jsonl"], ["--output", "train.jsonl"]),
    (["export", "--checkpoint", "./nowhere", "--output", "new"], ["--checkpoint", "nowhere"]),
    (["export", "--checkpoint", "model", "--output", "new", "--adapter", "empty"], ["adapter", "empty"]),
    (["plot", "empty"], ["empty", "metrics.jsonl"]),
    (["prep", "gsm9k"], ["gsm9k", "gsm8k"]),
    (["nonsense"], ["nonsense"]),
    ([], ["COMMAND"]),
]


def test_other_commands(place: Path, checkpoint: Path) -> None:
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "something").touch()
    all_refused(place, OTHER_CASES)
    assert not (place / "new").exists()


def test_files_cut_short(place: Path, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    start = [*TRAIN, "--model.config", "null", "--model.pretrained_model_name_or_path", "model"]
    export = ["export", "--checkpoint", "model", "--output", "new"]
    all_refused(place, [(words, ["model.safetensors"]) for words in (GENERATE, export, start)])
    (checkpoint / "config.json").write_text('{"model_type": "lla')
    all_refused(place, [(words, ["config.json"]) for words in (GENERATE, export, start)])


def test_a_device_that_is_not_there(checkpoint: Path, refused_here, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused_here([*GENERATE, "--device", "cuda"])
    assert "cuda" in said and "--device cpu" in said
    assert "distributed.device" in refused_here([*TRAIN, "--distributed.device", "cuda"])


def test_no_checkpoint_that_can_be_used(place: Path, checkpoint: Path, refused_here) -> None:
    (place / "run").mkdir()
    (checkpoint / "manifest.json").unlink()
    checkpoint.rename(place / "run" / "step_7")
    said = refused_here(TRAIN)
    assert "step_7 is torn" in said and "checkpoint_dir" in said


def test_a_plot_into_nowhere(place: Path, refused_here) -> None:
    (place / "old").mkdir()
    event = {"event": "train", "step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0}
    (place / "old" / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert "missing" in refused_here(["plot", "old", "--output", "missing/loss.png"])


def test_layers_to_adapt_that_are_not_there(checkpoint: Path, refused_here) -> None:
    start = [*TRAIN, "--model.config", "null", "--model.pretrained_model_name_or_path", "model", "--dry-run"]
    said = refused_here([*start, "--peft.target_modules", "[qproj]"])
    assert "peft.target_modules: 'qproj' matches no linear layer" in said and "*.q_proj" in said


def test_steps_that_do_not_divide_by_blocks_work(place: Path, checkpoint: Path) -> None:
    words = ["generate", "--checkpoint", str(checkpoint), "--prompt", "hi", "--output", str(place / "out.jsonl")]
    assert main([*words, "--steps", "5", "--max-new-tokens", "10", "--block-size", "4"]) == 0
    record = json.loads((place / "out.jsonl").read_text())
    assert record["nfe"] == 5 and len(record["token_ids"]) <= 10
