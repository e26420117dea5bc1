"""`LoadedModel`: a network ready to sample from, with weights loaded, settings resolved and backend built once.

`generate`, `infill`, `chat`, `eval`, lm-evaluation-harness and validation during training all sample from a
LoadedModel: `plan.plan_job` → `load`, or `as_loaded` of a network that is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unmask.config.sampler import SamplerConfig
from unmask.data.chat import ChatTemplate
from unmask.distributed.failures import own_share
from unmask.distributed.inference import JointCalls, load_shared
from unmask.distributed.ranks import ALONE, Ranks
from unmask.distributed.runtime import idle_tensor_cores
from unmask.errors import ConfigError, DataError
from unmask.models.folders import end_ids
from unmask.models.loading import apply_adapter, build_model
from unmask.models.manifest import intact
from unmask.sampling.backends.backend import Backend, backend_for
from unmask.sampling.plan import JobPlan
from unmask.sampling.prompts import template_of
from unmask.sampling.settings import SamplerSettings, settings_for
from unmask.sampling.text import decoded, split_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADER = 64  # tokens at a prompt's end that are compared with the template's header


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to sample from, on one rank or several.

    `template` renders its prompts; None = the tokenizer's chat template, if it has one.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None  # None where prompts are token ids
    settings: SamplerSettings
    ranks: Ranks = ALONE  # the processes that prompts are divided among
    # Context in which ranks call a network that they share (`distributed.inference.divide_rows`).
    joint_calls: AbstractContextManager[Any] = dataclasses.field(default_factory=nullcontext)
    template: ChatTemplate | None = None

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
    def _template(self) -> ChatTemplate | None:
        if self.template is not None or self.tokenizer is None:
            return self.template
        try:
            return template_of(self.tokenizer, self.mask_id)
        except DataError:  # prompts of token ids or literal text need none; chats are refused when they are encoded
            return None

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        generation = getattr(self.model, "generation", {})
        more = stop_ids_of(self.config, generation, self.tokenizer, self._template)
        return tuple(sorted({*self.backend.spec.eos_ids, *more}))

    @property
    def turn_ids(self) -> frozenset[int]:
        """The tokens that the template writes around turns, which an answer's text leaves out."""
        return frozenset() if self._template is None else self._template.turn_ids

    @property
    def idle(self) -> str | None:
        """What is lost where the network's dtype leaves its device's tensor cores idle; None elsewhere."""
        weight = next(self.model.parameters())
        return idle_tensor_cores(weight.device, str(weight.dtype).removeprefix("torch."))

    def read(self, prompt_ids: Sequence[int], token_ids: Sequence[int], ended: bool) -> tuple[str, str | None]:
        """Return the text of an answer and its reasoning (None if it has none), both without special tokens.

        If the prompt ends with the template's header, what the template writes around an answer is left out, too.

        Args:
            ended: whether a stop token followed the answer's tokens.
        """
        assert self.tokenizer is not None
        text, reasoning = split_reasoning(token_ids, self.tokenizer, self.turn_ids)
        form = None if self._template is None else self._template.form
        if form is None or not (form.opening or form.lead):
            return text, reasoning
        if decoded(self.tokenizer, prompt_ids[-_HEADER:], special=True).endswith(form.header):
            opening, lead = (
                decoded(self.tokenizer, self.tokenizer.encode(part, add_special_tokens=False), self.turn_ids)
                for part in (form.opening, form.lead)
            )
            text = text.removeprefix(opening)
            text = text.removesuffix(lead) if ended else text
        return text, reasoning

    def with_sampler(self, sampler: SamplerConfig | None) -> LoadedModel:
        """Return the same network sampled with other settings; raises SamplingError."""
        return dataclasses.replace(self, settings=settings_for(self.model, sampler))


def stop_ids_of(
    config: Any,
    generation: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    template: ChatTemplate | None,
) -> tuple[int, ...]:
    """Return the tokens that end an answer, sorted: those of the checkpoint, its tokenizer and its chat template.

    Args:
        config: the family's configuration; its EOS counts where `generation` names none.
        generation: the values of generation_config.json.
        template: None = there is none.
    """
    eos_ids = getattr(config, "eos_token_ids", (config.eos_token_id,))
    ends = {*(end_ids(generation) or eos_ids), *(() if template is None else template.form.stop_ids)}
    if tokenizer is not None and isinstance(tokenizer.eos_token_id, int):
        ends.add(tokenizer.eos_token_id)
    return tuple(sorted(ends))


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
    if shard and ranks.size == 1:
        raise ConfigError("--shard: one process has nobody to share the model with; add --nproc-per-node N")
    with intact(plan.folder, plan.verify, own_share()), intact(plan.adapter, plan.verify, own_share()):
        if shard:
            model = load_shared(plan.model, dtype, device, None if plan.adapter is None else str(plan.adapter), ranks)
            joint_calls = JointCalls(model, ranks, device)
        else:
            model, joint_calls = build_model(plan.model, dtype, device), nullcontext()
            if plan.adapter is not None:
                apply_adapter(model, plan.adapter)
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
