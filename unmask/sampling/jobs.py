"""`LoadedModel`: a network ready to sample from, with weights loaded, settings resolved and backend built once.

`generate`, `infill`, `chat`, `eval`, lm-evaluation-harness and validation during training all sample from a
LoadedModel: `plan.plan_job` → `load`, or `as_loaded` of a network that is in memory.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unmask.config.sampler import SamplerConfig
from unmask.distributed.inference import JointCalls, load_shared
from unmask.distributed.ranks import ALONE, Ranks
from unmask.errors import ConfigError
from unmask.models.loading import apply_adapter, build_model
from unmask.sampling.backends.backend import Backend, backend_for
from unmask.sampling.plan import JobPlan
from unmask.sampling.settings import SamplerSettings, settings_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ends a turn in Llama-3-style templates, LLaDA's among them.
END_OF_TURN = "<|eot_id|>"


@dataclass(frozen=True)
class LoadedModel:
    """A network that can be sampled from, on one rank or several."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None  # None where prompts are token ids
    settings: SamplerSettings
    ranks: Ranks = ALONE  # the processes that prompts are divided among
    # Context in which ranks call a network that they share (`distributed.inference.divide_rows`).
    joint_calls: AbstractContextManager[Any] = dataclasses.field(default_factory=nullcontext)

    @property
    def config(self) -> Any:
        """The family's configuration."""
        return self.model.config

    @property
    def mask_id(self) -> int | None:
        """The mask token; None for uniform noise."""
        return self.config.mask_token_id

    @cached_property
    def backend(self) -> Backend:
        """What the denoising loop calls the network through."""
        return backend_for(self.model, self.settings)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's end of text, and the tokenizer's ends of text and of turn."""
        ids = set(self.backend.spec.eos_ids)
        if self.tokenizer is not None:
            if isinstance(self.tokenizer.eos_token_id, int):
                ids.add(self.tokenizer.eos_token_id)
            end_of_turn = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
            if isinstance(end_of_turn, int) and end_of_turn != self.tokenizer.unk_token_id:
                ids.add(end_of_turn)
        return tuple(sorted(ids))

    def with_sampler(self, sampler: SamplerConfig | None) -> LoadedModel:
        """Return the same network sampled with other settings; raises SamplingError."""
        return dataclasses.replace(self, settings=settings_for(self.model, sampler))


def load(
    plan: JobPlan, device: torch.device, dtype: str | None = None, ranks: Ranks = ALONE, shard: bool = False
) -> LoadedModel:
    """Load a planned checkpoint in eval mode; with several ranks a collective.

    Args:
        dtype: `float32`, `bfloat16` or `float16`; None = as stored.
        shard: every rank holds a part of the weights; False loads the whole network on each.

    Raises:
        ConfigError: `shard` on one rank.
        ModelError, TrainingError: weights that cannot be loaded; too little memory for a part.
    """
    if not shard:
        model, joint_calls = build_model(plan.model, dtype, device), nullcontext()
        if plan.adapter is not None:
            apply_adapter(model, plan.adapter)
    elif ranks.size == 1:
        raise ConfigError("--shard: one process has nobody to share the model with; add --nproc-per-node N")
    else:
        model = load_shared(plan.model, dtype, device, None if plan.adapter is None else str(plan.adapter), ranks)
        joint_calls = JointCalls(model, ranks)
    return LoadedModel(model.eval(), plan.tokenizer, plan.settings, ranks, joint_calls)


def as_loaded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, sampler: SamplerConfig | None = None
) -> LoadedModel:
    """Wrap a network that is in memory as a LoadedModel.

    Raises:
        SamplingError: a model of no known family, or a setting that its family does not have.
        ModelError: a bad value in the checkpoint's generation_config.json.
    """
    return LoadedModel(model, tokenizer, settings_for(model, sampler))
