"""The command line's shape: commands, both spellings of flags, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from unmask.cli import build_parser, main
from unmask.config.sampler import SamplerConfig

COMMANDS = ("quickstart", "train", "generate", "chat", "prep", "plot", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and f"usage: unmask {command}" in capsys.readouterr().out


def test_flags_have_both_spellings_and_what_none_sets_is_left_to_the_model() -> None:
    parser = build_parser()
    words = ["generate", "--checkpoint", "c", "--prompt", "a", "--prompt", "b"]
    default = parser.parse_args(words)
    settings = [field.name for field in dataclasses.fields(SamplerConfig)]
    assert all(getattr(default, name) is None for name in settings)
    assert (default.seed, default.prompt) == (42, ["a", "b"])
    for flag in ("--max_new_tokens", "--max-new-tokens"):
        assert parser.parse_args([*words, flag, "7"]).max_new_tokens == 7
    for flag in ("--dry_run", "--dry-run"):
        assert parser.parse_args(["train", "-c", "x", flag]).dry_run


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import unmask

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"unmask {unmask.__version__}\n"


def test_an_unknown_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "run", "--colour", "red"]) == 2
    assert capsys.readouterr().err == "unmask: error: unknown argument --colour; see `unmask plot --help`\n"
    assert main(["generate", "--checkpoint", "run", "--prompt", "so?", "--treshold=0.9"]) == 2
    assert "unknown argument --treshold=0.9 (did you mean '--threshold'?);" in capsys.readouterr().err


def test_an_unexpected_failure_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise PermissionError(13, "Permission denied", "/locked/file")

    monkeypatch.setattr("unmask.commands.plot.run", fail)
    assert main(["plot", "run"]) == 2
    assert capsys.readouterr().err == "unmask: error: /locked/file: Permission denied\n"


def test_ctrl_c_outside_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.commands.plot.run", interrupt)
    assert main(["plot", "run"]) == 130
    assert capsys.readouterr().err == "unmask: interrupted\n"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_segments_grow_unless_the_user_has_said_how_memory_is_allocated(name: str | None) -> None:
    """Before torch loads, which reads it."""
    code = "import os, sys\nfrom unmask.cli import main\nmain(['plot'])\nassert 'torch' not in sys.modules"
    code += "\nprint({name: value for name, value in os.environ.items() if name.endswith('ALLOC_CONF')})"
    environment = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    given = {} if name is None else {name: "max_split_size_mb:64"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
    ).stdout
    assert out == f"{given or {'PYTORCH_ALLOC_CONF': 'expandable_segments:True'}}\n"


def test_the_module_for_launchers_is_the_train_command() -> None:
    words = [sys.executable, "-m", "unmask.train", "-c", "nowhere.yaml"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("unmask: error: -c nowhere.yaml: cannot be read")
