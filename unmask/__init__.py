"""Fine-tune, evaluate and run diffusion language models. Importing this loads nothing heavy; using a name does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.models.registry import load_model as load_model
    from unmask.models.tokenizer import load_tokenizer as load_tokenizer
    from unmask.sampling.generate import Generation as Generation
    from unmask.sampling.generate import generate as generate
    from unmask.sampling.settings import SamplerConfig as SamplerConfig

__version__ = "0.1.0"

_HOME = {
    "Generation": "unmask.sampling.generate",
    "SamplerConfig": "unmask.sampling.settings",
    "generate": "unmask.sampling.generate",
    "load_model": "unmask.models.registry",
    "load_tokenizer": "unmask.models.tokenizer",
    "register": "unmask.models.llada.auto",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
