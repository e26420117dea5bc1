"""The lowest version of torch that the package accepts is the one that the tests run with."""

from __future__ import annotations

import re
import tomllib

import pytest
import torch


def test_the_floor_of_torch_is_what_is_tested(request: pytest.FixtureRequest) -> None:
    root = request.config.rootpath
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (floor,) = (each.removeprefix("torch>=") for each in dependencies if each.startswith("torch>="))
    (pinned,) = re.findall(r"^torch==([\d.]+)", (root / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned.startswith(f"{floor}.") and torch.__version__.startswith(pinned)
    # Makefile installs under constraints.txt, .ci/run by the Makefile; so may a person without either.
    assert "-c constraints.txt" in (root / "Makefile").read_text() and "setup" in (root / ".ci" / "run").read_text()
    assert f"torch {floor} or newer" in (root / "docs" / "fine-tuning.md").read_text()
    assert f"torch {floor} or newer" in (root / "README.md").read_text()
