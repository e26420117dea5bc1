"""The made-up family's configuration, with config.json's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class MadeUpConfig:
    """What defines a made-up network."""

    family: ClassVar[str] = "made_up"

    width: int
    layers: int
    vocab_size: int
    max_sequence_length: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.vocab_size
