"""Check 1: `unmask doctor` finds nothing wrong with the machine, its kernels and each family's small checkpoint."""

from __future__ import annotations

from unmask.doctor import subject
from unmask.doctor.examine import CHECKS, examine


def test_the_doctor_finds_no_error(device, measured) -> None:
    found = list(examine(subject.machine()))
    assert [finding.text for _, finding in found if finding.level == "error"] == []
    for check, finding in found:
        measured(f"{finding.level:8}{check:10}{finding.text}")
    if device.type == "cuda":
        assert not any(finding.text.startswith("not checked: attention") for _, finding in found)


def test_the_doctor_runs_both_networks(device, folders) -> None:
    for folder in folders.values():
        found = list(examine(subject.checkpoint(folder)))
        assert {check for check, _ in found} >= CHECKS.keys() - {"experts"}
        errors = [finding.text for _, finding in found if finding.level == "error"]
        assert all("no tokenizer" in text for text in errors), errors  # which the LLaDA of the fixtures lacks
