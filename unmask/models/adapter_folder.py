"""Where a LoRA adapter lives. Needs no torch, so that a wrong path is reported at once."""

from __future__ import annotations

from pathlib import Path

from unmask.errors import ModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def find_adapter(folder: str | Path) -> Path:
    """Return the adapter folder that a path (or a run directory) stands for; ModelError when it holds none."""
    path = Path(folder).expanduser()
    for candidate in (path, path / "latest"):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    raise ModelError(f"adapter: {path.absolute()} is no adapter: it needs {CONFIG} and {WEIGHTS}")
