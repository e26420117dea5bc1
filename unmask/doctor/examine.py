"""The table of checks, and the loop that runs them; `unmask doctor` prints what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from unmask.doctor.findings import Finding
from unmask.doctor.kernels import check_attention, check_compile, check_experts
from unmask.doctor.machine import check_devices, check_hub
from unmask.doctor.model import check_files, check_forward, check_memory, check_tokenizer
from unmask.doctor.subject import Subject
from unmask.doctor.versions import check_versions
from unmask.errors import UnmaskError

Check = Callable[[Subject], Iterator[Finding]]


def _versions(_: Subject) -> Iterator[Finding]:
    return check_versions()


def _input(subject: Subject) -> Iterator[Finding]:
    """Say what is examined, or why it cannot be read; other checks then look at the machine alone."""
    if subject.problem:
        yield Finding("error", subject.problem)
        yield Finding("note", f"not checked: anything of {subject.name} but that; mend it and look again")
    elif subject.plan is not None:
        yield Finding("ok", f"{subject.name}: {subject.plan.family.name}, {subject.plan.source or 'a fresh network'}")
    for line in subject.prepared.not_needed if subject.prepared is not None else ():
        yield Finding("note", f"not needed here: {line}")


# What is examined, in this order: cheap things first.
CHECKS: dict[str, Check] = {
    "input": _input,
    "versions": _versions,
    "devices": check_devices,
    "hub": check_hub,
    "files": check_files,
    "tokenizer": check_tokenizer,
    "memory": check_memory,
    "compile": check_compile,
    "experts": check_experts,
    "attention": check_attention,
    "forward": check_forward,
}


def examine(subject: Subject) -> Iterator[tuple[str, Finding]]:
    """Run every check; yield its name with each finding. A check that fails is a finding, and the others go on."""
    for name, check in CHECKS.items():
        try:
            for finding in check(subject):
                yield name, finding
        except UnmaskError as error:
            yield name, Finding("error", str(error))
        except Exception as error:  # whatever a broken installation raises is what is looked for here
            reason = " ".join(str(error).split())[:300]
            yield name, Finding("error", f"the check itself failed: {type(error).__name__}: {reason}")
