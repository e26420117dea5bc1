"""Settings that go together, by name: how fast, and at what price. No torch.

`reference` is the published algorithm. `balanced` and `fast` trade agreement with it for fewer and cheaper calls; what
they cost and save is in docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.config.sampler import PROBABILITIES

# Family → preset → settings over the family's own.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "LLaDA": {
        "reference": {},
        "balanced": {"threshold": 0.9, "cache": "prefix"},
        "fast": {"threshold": 0.9, "cache": "dual"},
    },
    "DiffusionGemma": {
        "reference": {},
        "balanced": {"steps": 24, "confidence_threshold": 0.01},
        "fast": {"steps": 16, "confidence_threshold": 0.02},
    },
}

# Settings of which one excludes the others.
_RULES = ("threshold", "factor", "entropy_bound")


def preset_settings(family: str, preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a preset adds to the settings that are given, which win over it.

    A given rule (or, for masks, a number of steps or a score that is no probability) takes the place of the preset's
    rule altogether: beside it, it would contradict it or mean nothing. A score that is one keeps the preset's rule.

    Args:
        family: a key of `PRESETS`.
        preset: its name; None adds nothing.
        given: settings by name.
    """
    values = {} if preset is None else dict(PRESETS[family][preset])
    replaced = any(name in given for name in (*_RULES, "steps"))
    if family == "LLaDA" and (replaced or given.get("remasking", PROBABILITIES[0]) not in PROBABILITIES):
        values = {name: value for name, value in values.items() if name not in _RULES}
    return {name: value for name, value in values.items() if name not in given}
