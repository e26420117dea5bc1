"""The made-up family's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from unmask.errors import ModelError


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


def parse_config(values: Mapping[str, Any], where: str) -> MadeUpConfig:
    """Read the keys of a config.json; ModelError for one that is missing or not known."""
    names = {field.name for field in fields(MadeUpConfig)}
    given = values.keys() - {"model_type", "architectures", "torch_dtype", "dtype"}
    if given != names:
        raise ModelError(f"{where}: {', '.join(sorted(given ^ names))}: unknown or missing")
    return MadeUpConfig(**{name: values[name] for name in names})
