"""Plans a sampling job without torch: finds checkpoint, adapter, tokenizer; resolves settings; checks the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config.sampler import SamplerConfig
from unmask.errors import ConfigError, SamplingError
from unmask.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_note,
    choice_note,
    find_adapter,
    read_generation,
    weights_fingerprint,
)
from unmask.models.registry import ModelPlan, plan_folder
from unmask.models.tokenizer import load_tokenizer, tokenizer_folder
from unmask.places import user_path
from unmask.sampling.settings import SamplerSettings, resolve_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class JobPlan:
    """A checkpoint and the settings that it is sampled with, nothing loaded yet; `jobs.load` loads it."""

    name: str  # as the user wrote it
    model: ModelPlan  # its family, configuration and folder
    adapter: Path | None  # folder of the LoRA adapter on top
    generation: Mapping[str, Any]  # the values of its generation_config.json, the adapter's over them
    settings: SamplerSettings
    tokenizer_folder: Path  # the adapter's where it has a tokenizer, else the checkpoint's
    where: str = "--checkpoint"  # the flag that named the checkpoint, for messages
    verify: bool = True  # whether the files of a run are compared with its manifest
    adapter_note: str = ""  # which of several adapters was taken

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

    def resolve(self, sampler: SamplerConfig | None) -> SamplerSettings:
        """Return this checkpoint's settings with others of the caller's; raises SamplingError."""
        return resolve_settings(sampler, self.model.family, self.config, self.generation)

    def fingerprint(self) -> dict[str, str | None]:
        """Return hashes that identify the weights and the adapter with its config."""
        adapter = None
        if self.adapter is not None:
            files = (self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
            adapter = blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()
        return {"weights": weights_fingerprint(self.folder), "adapter": adapter}

    def notes(self) -> list[str]:
        """Return warnings about the files: what of them is not used, an adapter that was trained over another base."""
        other_base = "" if self.adapter is None else base_note(self.adapter, self.folder)
        return [*self.model.notes, *(f"--adapter: {note}" for note in (self.adapter_note, other_base) if note)]


def plan_job(
    checkpoint: str,
    sampler: SamplerConfig | None = None,
    adapter: str | None = None,
    where: str = "--checkpoint",
    verify: bool = True,
) -> JobPlan:
    """Find a checkpoint with its adapter and tokenizer, and resolve the settings that it is sampled with.

    `checkpoint` is a folder, run directory or hub id, and `where` the flag that named it, for messages.

    Raises:
        ModelError: no such checkpoint, adapter or tokenizer, or a file cut short.
        SamplingError: a setting that the checkpoint's family does not have.
    """
    adapter_folder = None if adapter is None else find_adapter(adapter)
    note = (
        ""
        if adapter_folder is None
        else choice_note(user_path(str(adapter), "adapter"), adapter_folder, ADAPTER_CONFIG)
    )
    model = plan_folder(checkpoint, where)
    assert model.folder is not None
    generation = read_generation(model.folder, adapter_folder)
    settings = resolve_settings(sampler, model.family, model.config, generation)
    tokenizer = tokenizer_folder(str(model.folder), None if adapter_folder is None else str(adapter_folder), where)
    return JobPlan(checkpoint, model, adapter_folder, generation, settings, tokenizer, where, verify, note)


@dataclass(frozen=True)
class GenerateRequest:
    """What `unmask generate` is to answer, and where the answers go.

    The fields are the command's flags, but `prompts`: label for messages → prompt, as `generate` or `infill` takes it.

    Raises:
        SamplingError: a batch size below 1.
        ConfigError: a file that cannot be written, or is there already.
    """

    prompts: Mapping[str, Any]
    infill: bool = False
    raw: bool = False
    seed: int = 42
    batch_size: int | None = None
    output: str | None = None
    watch: bool = False
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise SamplingError(f"--batch_size: must be at least 1, got {self.batch_size}")
        for name in ("output", "trace"):
            value = getattr(self, name)
            if value is None:
                continue
            path = user_path(value, f"--{name}").absolute()
            if not path.parent.is_dir():
                raise ConfigError(f"--{name}: {path.parent} is no folder; create it first")
            if path.is_dir():
                raise ConfigError(f"--{name}: {value} is a folder; name a file in it")


def check_blank_sampler(sampler: SamplerConfig | None) -> None:
    """Refuse settings that do not apply to texts with blanks; raises SamplingError."""
    for name in ("max_new_tokens", "eos"):
        if sampler is not None and getattr(sampler, name) is not None:
            raise SamplingError(f"{name}: blanks are filled to the lengths that they name; leave it out")
