"""The made-up family's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from unmask.errors import ModelError
from unmask.models.pretrained_config import check_fields


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
    check_fields(values, names, {}, "made-up", where)
    if missing := sorted(names - values.keys()):
        raise ModelError(f"{where}: {', '.join(missing)}: missing")
    return MadeUpConfig(**{name: values[name] for name in names})
