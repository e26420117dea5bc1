"""What a model family tells the rest of the package about itself; a family's `family.py` holds one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def _never(key: str) -> bool:
    return False


def _untied(key: str) -> None:
    return None


@dataclass(frozen=True)
class FileLayout:
    """What a family's released files hold beside the tensors of its network, whose keys are the file's own.

    Attributes:
        carried: whether a stored tensor is none of the network's and is written again as it was read.
        twin: the key that a stored tensor repeats, where files may write tied weights twice; None otherwise.
    """

    carried: Callable[[str], bool] = _never
    twin: Callable[[str], str | None] = _untied


PLAIN = FileLayout()  # the network and nothing else


@dataclass(frozen=True)
class Family:
    """One row of the table of families, light enough to build without torch.

    Attributes:
        model_type: the value of config.json's `model_type`.
        provides: what its networks offer to objectives, for example `mask_token`.
        architecture: class name that a written config.json carries.
        parse_config: checks a config.json's values; arguments (values, where); raises ModelError.
        build: the network of a parsed configuration, weights undefined; respects torch's default device.
        initialise: draws fresh weights in place from an explicit generator.
        activation_bytes: bytes that a forward pass keeps for backward; arguments (config, tokens, bytes of a residual
            element, bytes of a matmul input, whether activation checkpointing is on).
        layout: what its files hold beside the network.
    """

    model_type: str
    provides: frozenset[str]
    architecture: str
    parse_config: Callable[[Mapping[str, Any], str], Any]
    build: Callable[[Any], nn.Module]
    initialise: Callable[[Any, torch.Generator], None]
    activation_bytes: Callable[[Any, int, int, int, bool], int]
    layout: FileLayout = PLAIN
