"""Installed packages: what this package asks of them, what they ask of each other, and pairs known to be bad."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from unmask.doctor.findings import Finding

# Shown where they are installed.
SHOWN = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class BadPair:
    """Versions that do not work together although each alone would do.

    Attributes:
        first, second: requirements that both hold where the pair is installed; `python` is a package, too.
        what: what goes wrong.
        remedy: what to install instead.
        source: where that was reported.
    """

    first: str
    second: str
    what: str
    remedy: str
    source: str


BAD_PAIRS = (
    BadPair(
        "peft>=0.18.1",
        "torchao<0.16",
        "PEFT raises ImportError wherever an adapter is attached",
        "pip install -U torchao, or uninstall it",
        "https://github.com/PrunaAI/pruna/pull/630",
    ),
    BadPair(
        "torch<2.11",
        "torchao>=0.18",
        "torchao imports names that this torch does not have",
        "upgrade torch, or pip install 'torchao<0.18'",
        "https://github.com/daydreamlive/DEMON/pull/325",
    ),
    BadPair(
        "transformers>=5",
        "peft<0.18",
        "PEFT cannot be imported: it asks transformers for HybridCache, which is gone",
        "pip install -U peft",
        "https://github.com/huggingface/peft/issues/3333",
    ),
    BadPair(
        "python>=3.14",
        "torch<2.10",
        "torch.compile raises RuntimeError, and so do FlexAttention and what bitsandbytes compiles",
        "upgrade torch, or use Python 3.13",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1813",
    ),
)


def installed(package: str) -> Version | None:
    """Return the version of an installed package, `python` among them; None where there is none."""
    if package == "python":
        return Version(platform.python_version())
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def check_versions() -> Iterator[Finding]:
    """Compare the installed packages with our requirements, with torch's own pins and with the known bad pairs."""
    found = {name: version for name in SHOWN if (version := installed(name)) is not None}
    shown = ", ".join([f"Python {platform.python_version()}", *(f"{name} {found[name]}" for name in found)])
    problems = [*_floors(), *_pins_of_torch(), *bad_pairs()]
    yield Finding("note" if problems else "ok", shown)
    yield from problems


def bad_pairs() -> Iterator[Finding]:
    """Yield a finding for each known bad pair that is installed."""
    for pair in BAD_PAIRS:
        both = [Requirement(text) for text in (pair.first, pair.second)]
        versions = [installed(each.name) for each in both]
        if all(version is not None and _holds(each, version) for each, version in zip(both, versions, strict=True)):
            named = " with ".join(f"{each.name} {version}" for each, version in zip(both, versions, strict=True))
            yield Finding("error", f"{named}: {pair.what} ({pair.source})", pair.remedy)


def _floors() -> Iterator[Finding]:
    """Yield a finding for each requirement of ours that is not met; what is optional may be missing."""
    try:
        requirements = metadata.requires("unmask") or []
    except metadata.PackageNotFoundError:
        yield Finding("note", "unmask runs without being installed, so its requirements are not known here")
        return
    for each in map(Requirement, requirements):
        if each.name == "unmask":
            continue
        optional = each.marker is not None and "extra" in str(each.marker)
        version = installed(each.name)
        if version is None and not optional:
            yield Finding("error", f"{each.name} is not installed", f"pip install '{each.name}{each.specifier}'")
        elif version is not None and not _holds(each, version):
            yield Finding(
                "error",
                f"{each.name} {version} is older than unmask needs ({each.specifier})",
                f"pip install -U '{each.name}{each.specifier}'",
            )


def _pins_of_torch() -> Iterator[Finding]:
    """Yield a finding for each package that torch was built for in one version and that is there in another."""
    for each in map(Requirement, metadata.requires("torch") or []):
        pinned = any(part.operator == "==" for part in each.specifier)
        version = installed(each.name)
        wanted = each.marker is None or each.marker.evaluate({"extra": ""})
        if pinned and wanted and version is not None and not _holds(each, version):
            yield Finding(
                "warning",
                f"{each.name} {version} is installed, and torch {installed('torch')} was built for {each.specifier}",
                f"pip install '{each.name}{each.specifier}'",
            )


def _holds(requirement: Requirement, version: Version) -> bool:
    return requirement.specifier.contains(version, prereleases=True)
