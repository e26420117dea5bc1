"""One model of an evaluation: where it lies, and what tells it from another. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from unmask.models.adapter_folder import CONFIG, WEIGHTS
from unmask.models.folders import weights_fingerprint


@dataclass(frozen=True)
class Contestant:
    """One model to be evaluated.

    Attributes:
        label: short name for tables and files, no two the same.
        checkpoint: folder with its config.json.
        adapter: folder of the adapter on top, or None.
        tokenizer: folder of its tokenizer.
    """

    label: str
    checkpoint: str
    adapter: str | None
    tokenizer: str

    def fingerprint(self) -> dict[str, str | None]:
        """Return what tells its weights, and the rank and scale of its adapter, from another's."""
        adapter = None
        if self.adapter is not None:
            files = (Path(self.adapter) / name for name in (CONFIG, WEIGHTS))
            adapter = blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()
        return {"weights": weights_fingerprint(Path(self.checkpoint)), "adapter": adapter}
