"""Which weights a LoRA adapter was trained over, as far as it is known. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from unmask.models.folders import weights_fingerprint


def base_note(adapter: Path, checkpoint: Path) -> str:
    """Return a warning where an adapter was trained over other weights than a checkpoint's; else, or not known, empty.

    Args:
        adapter: from `find_adapter`. What it was trained over stands in the state.json of the run that made it.
        checkpoint: folder of the base that it is to be applied to.
    """
    try:
        base = json.loads((adapter / "state.json").read_text(encoding="utf-8"))["identity"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if base is None or base == weights_fingerprint(checkpoint):
        return ""
    return (
        f"{adapter} was trained over other weights than those of {checkpoint}; give the checkpoint that it was trained "
        "over, unless another was meant"
    )
