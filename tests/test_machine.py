"""Cores and memory are those of the machine, or of the container that limits them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unmask import machine
from unmask.machine import available_memory, cores, host_memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's control group, empty, so without limits."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    place = next((line.removeprefix("0::") for line in own if line.startswith("0::")), None)
    if place is None:
        pytest.skip("this machine has no control groups of version 2")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    folder = tmp_path / place.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_containers_share_of_time_counts(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores() == 64
    for text, expected in [("max 100000\n", 64), ("250000 100000\n", 3), ("50000 100000\n", 1)]:
        (group / "cpu.max").write_text(text)
        assert cores() == expected


def test_a_containers_memory_counts(group: Path) -> None:
    whole = host_memory()
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") and 0 < available_memory() <= whole
    (group / "memory.max").write_text("max\n")
    assert host_memory() == whole
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("2000000\n")
    assert host_memory() == 5_000_000 and available_memory() == 3_000_000
    (group / "memory.current").write_text("6000000\n")
    assert available_memory() == 0
