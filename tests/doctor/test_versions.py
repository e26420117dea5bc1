"""Law: a package older than asked for, one torch was not built for, and each known bad pair is named with a remedy."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from unmask.doctor import versions
from unmask.doctor.versions import BAD_PAIRS, BadPair, bad_pairs, check_versions


def install(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Have packages appear in these versions and no others."""
    monkeypatch.setattr(versions, "installed", lambda name: Version(found[name]) if name in found else None)


def edge(text: str) -> tuple[str, str, str]:
    """The package of a requirement, its version at the limit, and whether it is a lower one."""
    requirement = Requirement(text)
    (limit,) = requirement.specifier
    return requirement.name, limit.version, limit.operator


@pytest.mark.parametrize("pair", BAD_PAIRS, ids=lambda pair: f"{pair.first} {pair.second}")
def test_a_bad_pair_is_found_and_its_neighbours_are_not(pair: BadPair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair.source.startswith("https://") and pair.remedy and pair.what
    (first, first_version, first_operator), (second, second_version, second_operator) = (
        edge(pair.first),
        edge(pair.second),
    )
    low = {">=": lambda version: version, "<": lambda _: "0.1"}
    bad = {first: low[first_operator](first_version), second: low[second_operator](second_version)}
    install(monkeypatch, **bad)
    (finding,) = [each for each in bad_pairs() if pair.source in each.what]
    assert finding.level == "error" and bad[second] in finding.what and finding.remedy == pair.remedy
    good = {">=": lambda _: "0.1", "<": lambda version: version}
    for name, version in (
        (first, good[first_operator](first_version)),
        (second, good[second_operator](second_version)),
    ):
        install(monkeypatch, **{**bad, name: version})
        assert not [each for each in bad_pairs() if pair.source in each.what]
        install(monkeypatch, **{other: text for other, text in bad.items() if other != name})
        assert not list(bad_pairs())


def test_what_the_tests_run_with_is_no_known_bad_pair() -> None:
    assert [finding.text for finding in check_versions() if finding.level == "error"] == []


def test_an_old_or_missing_requirement_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"unmask": ["torch>=2.8", "numpy>=2.0", "rich>=13.7", 'wandb>=0.19; extra == "wandb"'], "torch": []}
    monkeypatch.setattr(metadata, "requires", lambda name: asked[name])
    install(monkeypatch, python="3.11.0", torch="2.7.1", rich="14.0", wandb="0.20")
    found = [finding.text for finding in check_versions() if finding.level == "error"]
    assert found == [
        "torch 2.7.1 is older than unmask needs (>=2.8); pip install -U 'torch>=2.8'",
        "numpy is not installed; pip install 'numpy>=2.0'",
    ]


def test_triton_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"unmask": [], "torch": ["triton==3.7.1", "jinja2", "absent==1.0", 'other==1.0; sys_platform == "none"']}
    monkeypatch.setattr(metadata, "requires", lambda name: asked[name])
    install(monkeypatch, python="3.11.0", torch="2.13.0", triton="3.4.0", jinja2="3.1", other="2.0")
    found = [finding.text for finding in check_versions() if finding.level == "warning"]
    assert found == ["triton 3.4.0 is installed, and torch 2.13.0 was built for ==3.7.1; pip install 'triton==3.7.1'"]
