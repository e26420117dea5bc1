"""Law: the exit status says the worst of what was found, and every finding is one line."""

from __future__ import annotations

import pytest

from unmask.doctor.findings import LEVELS, Finding, exit_status


@pytest.mark.parametrize(
    ("levels", "status"),
    [
        ((), 0),
        (("ok",), 0),
        (("note", "ok"), 0),
        (("ok", "warning", "note"), 1),
        (("error", "ok", "warning"), 2),
    ],
)
def test_the_status_is_the_worst(levels, status: int) -> None:
    assert exit_status(Finding(level, "x") for level in levels) == status


def test_a_finding_is_one_line_with_its_remedy_last() -> None:
    assert all(Finding(level, "too\n  old", "pip\ninstall").text == "too old; pip install" for level in LEVELS)
    assert Finding("ok", "as it\nshould be").text == "as it should be"
