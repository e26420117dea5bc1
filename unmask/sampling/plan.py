"""A checkpoint to be sampled from, found and checked before torch loads and before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config.sampler import SamplerConfig
from unmask.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_note,
    find_adapter,
    read_generation,
    weights_fingerprint,
)
from unmask.models.registry import ModelPlan, plan_folder
from unmask.models.tokenizer import load_tokenizer, tokenizer_folder
from unmask.sampling.settings import Settings, default_settings, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class JobPlan:
    """A checkpoint, found, and the settings that it is sampled with. `jobs.load` makes a LoadedModel of it.

    Attributes:
        model: its family, configuration and folder.
        adapter: folder of the LoRA adapter on top, or None.
        generation: the values of its generation_config.json.
        settings: those in force.
        tokenizer_folder: the adapter's where it has a tokenizer, else the checkpoint's.
        where: the flag that named the checkpoint, for messages.
    """

    model: ModelPlan
    adapter: Path | None
    generation: Mapping[str, Any]
    settings: Settings
    tokenizer_folder: Path
    where: str = "--checkpoint"

    @property
    def config(self) -> Any:
        """The family's configuration."""
        return self.model.config

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        assert self.model.folder is not None
        return self.model.folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first asked for; raises ModelError."""
        return load_tokenizer(str(self.tokenizer_folder), self.where)

    def resolve(self, sampler: SamplerConfig | None) -> Settings:
        """Return the settings in force where a caller wants these; raises SamplingError."""
        return resolve(sampler, default_settings(self.config, self.generation))

    def fingerprint(self) -> dict[str, str | None]:
        """Return what tells its weights, and the rank and scale of its adapter, from another's."""
        adapter = None
        if self.adapter is not None:
            files = (self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
            adapter = blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()
        return {"weights": weights_fingerprint(self.folder), "adapter": adapter}

    def base_note(self) -> str:
        """Return a warning where the adapter was trained over other weights than these; else empty."""
        return "" if self.adapter is None else base_note(self.adapter, self.folder)


def plan_job(
    checkpoint: str, sampler: SamplerConfig | None = None, adapter: str | None = None, where: str = "--checkpoint"
) -> JobPlan:
    """Find a checkpoint with its adapter and tokenizer, and resolve the settings that it is sampled with.

    Args:
        checkpoint: a folder, run directory or hub id.
        sampler: settings that a caller wants; None = the checkpoint's own.
        adapter: folder of a LoRA adapter.
        where: the flag that named the checkpoint, for messages.

    Raises:
        ModelError: no such checkpoint, adapter or tokenizer, or a file cut short.
        SamplingError: a setting that the checkpoint's family does not have.
    """
    found = None if adapter is None else find_adapter(adapter)
    model = plan_folder(checkpoint, where)
    assert model.folder is not None
    generation = read_generation(model.folder)
    settings = resolve(sampler, default_settings(model.config, generation))
    tokenizer = tokenizer_folder(str(model.folder), None if found is None else str(found), where)
    return JobPlan(model, found, generation, settings, tokenizer, where)
