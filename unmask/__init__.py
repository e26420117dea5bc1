"""Fine-tune, evaluate and run diffusion language models. Importing this loads nothing heavy; using a name does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.config.sampler import SamplerConfig as SamplerConfig
    from unmask.evaluation.canvas_likelihood import ar_log_likelihood as ar_log_likelihood
    from unmask.evaluation.canvas_likelihood import denoising_cross_entropy as denoising_cross_entropy
    from unmask.evaluation.likelihood import LogLikelihood as LogLikelihood
    from unmask.evaluation.likelihood import log_likelihood as log_likelihood
    from unmask.models.loading import load_model as load_model
    from unmask.models.tokenizer import load_tokenizer as load_tokenizer
    from unmask.sampling.engine.loop import StepEvent as StepEvent
    from unmask.sampling.generate import Generation as Generation
    from unmask.sampling.generate import generate as generate
    from unmask.sampling.generate import stream as stream
    from unmask.sampling.infill import Infill as Infill
    from unmask.sampling.infill import infill as infill

__version__ = "0.1.0"

_HOME = {
    "Generation": "unmask.sampling.generate",
    "Infill": "unmask.sampling.infill",
    "LogLikelihood": "unmask.evaluation.likelihood",
    "SamplerConfig": "unmask.config.sampler",
    "StepEvent": "unmask.sampling.engine.loop",
    "ar_log_likelihood": "unmask.evaluation.canvas_likelihood",
    "denoising_cross_entropy": "unmask.evaluation.canvas_likelihood",
    "generate": "unmask.sampling.generate",
    "infill": "unmask.sampling.infill",
    "load_model": "unmask.models.loading",
    "load_tokenizer": "unmask.models.tokenizer",
    "log_likelihood": "unmask.evaluation.likelihood",
    "register": "unmask.models.registry",
    "stream": "unmask.sampling.generate",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
