"""The quickstart: its folder is its own, and (slowly) it learns what it promises."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.config import load_config
from unmask.quickstart import CONFIG, RUN, clear, configuration, learned, make_problems, write_run


def test_its_configuration_is_one_that_train_takes(tmp_path: Path) -> None:
    train, held_out = make_problems(100, 10, seed=0)
    root = tmp_path / "quickstart"
    write_run(root, train, held_out, configuration(root, seed=7))
    config = load_config(root / CONFIG).config
    assert config.seed == 7
    assert config.checkpoint.checkpoint_dir == str(root / RUN)
    assert len((root / "train.jsonl").read_text().splitlines()) == 100


def test_a_folder_with_something_else_is_refused_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "is no earlier quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_quickstart_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "quickstart"
    root.mkdir()
    (root / CONFIG).write_text("model: {}")
    (root / RUN).mkdir()
    clear(root)
    assert list(root.iterdir()) == []


def test_training_ends_at_the_third_good_validation_running() -> None:
    judge = learned()
    assert [judge({"exact_match": match}) for match in (0.2, 0.99, 0.98, 0.97, 1.0, 0.975, 0.98)] == [False] * 6 + [
        True
    ]


def processor_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_it_learns_held_out_problems_within_four_minutes(tmp_path: Path) -> None:
    earlier = processor_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "unmask", "quickstart", "--output", "qs"],
        cwd=tmp_path, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"([\d.]+)% (?:before training|after)", done.stdout)
    assert float(before) <= 5 and float(after) >= 90, done.stdout
    # Four minutes of two cores, which other tests and programs may share.
    assert processor_seconds_of_children() - earlier < 2 * 240
    assert (tmp_path / "qs" / "run" / "loss.png").stat().st_size > 10_000
    shown = subprocess.run(
        [sys.executable, "-m", "unmask", "generate", "--checkpoint", "qs/run", "--max_new_tokens", "24",
         "--prompt", "Ada has 30 pens and buys 4. How many now?"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0 and "####" in shown.stdout
