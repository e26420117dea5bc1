"""What a dry run shows and a run uses, all but the network: tokenizer, template, data, objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.data.chat import ChatTemplate
from unmask.data.check import count_later_turns
from unmask.data.encode import Encode, RememberedRows, RowEncoder
from unmask.data.loader import TrainLoader
from unmask.data.template_loading import check_end, load_template
from unmask.distributed.processes import data_workers
from unmask.distributed.ranks import ALONE, Ranks
from unmask.errors import ConfigError
from unmask.models.folders import read_generation
from unmask.models.tokenizer import load_tokenizer
from unmask.objectives.registry import OBJECTIVES, Objective, build_objective
from unmask.prepare import Prepared
from unmask.sampling.jobs import stop_ids_of


@dataclass(frozen=True)
class Parts:
    """The pieces of a run that a dry run shows and a run uses.

    Attributes:
        encode: row and epoch → tokens, or the reason to leave the row out.
        pad_token_id: padding; the model's EOS where it is supervised.
        stop_ids: the tokens that end an answer, as they are stored with each checkpoint.
    """

    tokenizer: Any
    template: ChatTemplate
    encode: Encode
    loader: TrainLoader
    objective: Objective
    pad_token_id: int
    stop_ids: tuple[int, ...]


def build_parts(prepared: Prepared, ranks: Ranks = ALONE) -> Parts:
    """Build tokenizer, template, this rank's loader and objective; the network is not touched."""
    config, plan = prepared.config, prepared.plan
    tokenizer = load_tokenizer(str(prepared.tokenizer_folder), "dataset.tokenizer")
    if len(tokenizer) > plan.config.rows:
        raise ConfigError(
            f"dataset.tokenizer: {prepared.tokenizer_folder} has {len(tokenizer)} ids, the model's embedding only "
            f"{plan.config.rows}; use the model's own tokenizer"
        )
    mask = plan.config.mask_token_id
    if mask is not None:
        _check_mask(tokenizer, mask, prepared.tokenizer_folder)
    template = load_template(
        tokenizer,
        config.dataset.chat_template,
        [] if mask is None else [mask],
        variables=config.dataset.chat_template_kwargs,
        supervise_reasoning=config.dataset.supervise_reasoning,
    )
    stop_ids = _ends(template, prepared)
    tokenizer.chat_template = template.source  # what evaluation during training prompts with, and what is saved
    encode: Encode = RowEncoder(prepared.rows, template, config.dataset, config.seed)
    if config.dataloader.num_workers == 0:
        encode = RememberedRows(encode)
    pad = plan.config.eos_token_id
    loader = TrainLoader(
        prepared.rows,
        encode,
        config=replace(config.dataloader, num_workers=data_workers(config.dataloader.num_workers)),
        global_batch_size=config.step_scheduler.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        rank=ranks.rank,
        world_size=ranks.size,
        seed=config.seed if config.dataset.shuffle_seed is None else config.dataset.shuffle_seed,
        pad_token_id=pad,
        supervise_padding=bool(config.dllm.supervise_padding),
        seq_length=config.dataset.seq_length,
        gather=ranks.gather,
    )
    return Parts(tokenizer, template, encode, loader, build_objective(config.dllm, plan.config), pad, stop_ids)


def _ends(template: ChatTemplate, prepared: Prepared) -> tuple[int, ...]:
    """Return the tokens that end an answer; refuse a template from which the model would not learn to write one."""
    config, plan, form = prepared.config, prepared.plan, template.form
    if not (config.dllm.supervise_padding or OBJECTIVES[config.dllm.mode].fills):
        check_end(template)
    mask = plan.config.mask_token_id
    for token in sorted({*form.stop_ids, *template.turn_ids}):
        word = template.tokenizer.convert_ids_to_tokens(token)
        if token == mask:
            raise ConfigError(
                f"dataset.chat_template: {template.name} writes {word!r}, whose id {token} is the model's "
                "mask_token_id; give the tokenizer a mask token of its own with that id, and the template's another"
            )
        if token in form.stop_ids and token >= plan.config.vocab_size:
            raise ConfigError(
                f"dataset.chat_template: {template.name} closes an answer with {word!r}, whose id {token} is beyond "
                f"the model's vocab_size {plan.config.vocab_size}, so it would never be written; set vocab_size in the "
                f"model's config.json to {len(template.tokenizer)} (its embedding has {plan.config.rows} rows)"
            )
    generation = {} if plan.folder is None else read_generation(plan.folder)
    return stop_ids_of(plan.config, generation, template.tokenizer, template)


def _check_mask(tokenizer: Any, mask_token_id: int, folder: Path) -> None:
    """Refuse a mask that text can contain: the network could not tell it from what is hidden."""
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if mask_token_id < len(tokenizer) and mask_token_id not in special:
        raise ConfigError(
            f"dataset.tokenizer: {folder} uses the model's mask_token_id {mask_token_id} for ordinary text "
            f"({tokenizer.convert_ids_to_tokens(mask_token_id)!r}); use the model's own tokenizer, or add a mask token "
            "to this one and set the model's mask_token_id to its id"
        )


def seen_later_turns(prepared: Prepared, template: ChatTemplate) -> list[str]:
    """Return a line for each data section whose answers are learned or scored with later turns in sight."""
    config, lines = prepared.config, []
    if prepared.plan.family.attention != "bidirectional":
        return []
    sections = (
        ("dataset", config.dataset, prepared.rows),
        ("validation_dataset", config.validation_dataset, prepared.validation_rows),
    )
    for name, section, rows in sections:
        if section is None or rows is None or section.answers != "all":
            continue
        count = count_later_turns(rows, template)
        looked_at = f"{count.rows:,}" if count.rows == len(rows) else f"{count.rows:,} of {len(rows):,}"
        advice = "; answers: one or last lets none of them" if count.followed else ""
        lines.append(
            f"{name}.answers: all: {count.followed:,} of {count.answers:,} answers see later turns of their "
            f"conversations (in {looked_at} rows){advice}"
        )
    return lines
