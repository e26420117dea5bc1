"""`--dry-run`: what a person needs to see before spending a GPU-day. Loads no weights."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

from unmask.announce import left_out, matmul_notes, noted
from unmask.batch import Batch
from unmask.config import dump_config
from unmask.data.check import check_rows
from unmask.data.encode import RowEncoder
from unmask.distributed.processes import cores
from unmask.distributed.ranks import Ranks
from unmask.distributed.runtime import pick_device
from unmask.models.experts import freeze_routers
from unmask.models.loading import empty_network
from unmask.models.weights import check_tensors
from unmask.parts import Parts, build_parts, seen_later_turns
from unmask.prepare import Prepared
from unmask.report.progress import checking_rows
from unmask.rng import NoiseStream
from unmask.training.estimate import Estimate, SharedEstimate, estimate_memory, estimate_shared
from unmask.training.lora import attach
from unmask.training.optim import check_rounding

ROWS = 3
HIDDEN = "dim"  # style of a masked position, drawn as one block of shade
CHANGED = "red"  # style of a token that noise replaced


def show_plan(prepared: Prepared, console: Console) -> None:
    """Print the resolved configuration, sizes, and three training rows clean and corrupted."""
    config, plan = prepared.config, prepared.plan
    device = pick_device(config.distributed.device)
    parts = build_parts(prepared, Ranks(0, prepared.degrees.world))
    checked = _check(prepared, parts, console)
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config).to(getattr(torch, config.model.torch_dtype))
        if plan.folder is not None and plan.hub_id is None:  # of a hub id the weights need not be here
            check_tensors(model, plan.folder, plan.family.files)
        if config.peft is not None:
            attach(model, config.peft, "")
        if config.dllm.freeze_router:
            freeze_routers(model)
    check_rounding(config.optimizer, model)
    console.print(Rule("configuration"))
    console.print(Syntax(dump_config(config), "yaml", background_color="default"))
    for key in prepared.not_needed:
        console.print(f"not needed here: {key}", markup=False)
    for line in plan.notes:
        console.print(f"warning: {line}", markup=False, highlight=False)
    console.print(Rule("size"))
    estimate = estimate_memory(config, plan, model)
    steps = config.step_scheduler
    total = steps.total_steps(parts.loader.steps_per_epoch)
    lines = [*_sizes(prepared, parts, estimate, total), *checked, *seen_later_turns(prepared, parts.template)]
    if prepared.degrees.world > 1:
        lines += _shared(prepared, estimate_shared(config, plan, model, estimate, prepared.degrees))
    lines += matmul_notes(config, device)
    never_seen = parts.loader.never_seen(total)
    if never_seen is not None:
        lines.append(never_seen)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    first = next(iter(parts.loader))
    noisy = [parts.objective.corrupt(batch, NoiseStream(config.seed)) for batch in first]
    console.print(Rule(f"the first {ROWS} rows of step 1: clean (supervised tokens green), then corrupted"))
    shown = 0
    for batch, corrupted in zip(first, noisy, strict=True):
        for row in range(len(batch.input_ids_BL)):
            if shown == ROWS:
                return
            shown += 1
            where = prepared.rows.describe(int(batch.sample_ids_B[row]))
            console.print(f"\n[{shown}] {where}, {int(batch.attention_mask_BL[row].sum())} tokens", markup=False)
            console.print(_clean(batch, row, parts.tokenizer))
            seen = parts.objective.shown(corrupted, row)
            console.print(f"    corrupted: {seen.what}", style="dim", highlight=False)
            marks = [HIDDEN if h else CHANGED if c else "" for h, c in zip(seen.hidden, seen.changed, strict=True)]
            console.print(_pieces(seen.ids, marks, [True] * len(marks), parts.tokenizer))


def _check(prepared: Prepared, parts: Parts, console: Console) -> list[str]:
    """Check the rows of both data sets, and return what is to be said of them."""
    lines = []
    sources = [("rows checked      ", prepared.rows, parts.encode)]
    if prepared.validation_rows is not None and prepared.config.validation_dataset is not None:
        section = prepared.config.validation_dataset
        encode = RowEncoder(prepared.validation_rows, parts.template, section, where="validation_dataset")
        sources.append(("validation checked ", prepared.validation_rows, encode))
    for label, rows, encode in sources:
        with checking_rows(console) as tick:
            checked = check_rows(rows, encode, cores(), tick)
        lines += [f"{label}{checked.summary}", *left_out(checked.dropped, checked.examples)]
        lines += noted(checked.noted, checked.examples)
    return lines


def _sizes(prepared: Prepared, parts: Parts, estimate: Estimate, total: int) -> list[str]:
    steps = prepared.config.step_scheduler
    length = prepared.config.dataset.seq_length
    gib, world = 2**30, prepared.degrees.world
    skipped, processes = len(prepared.rows.skipped), "" if world == 1 else f" on {world} processes"
    return [
        f"parameters        {estimate.parameters:,} ({estimate.trainable:,} trained)",
        f"rows              {len(prepared.rows):,}" + (f" ({skipped} malformed skipped)" if skipped else ""),
        f"answers end with  {_ends(parts)}",
        f"steps             {total:,} ({parts.loader.steps_per_epoch:,} an epoch)",
        f"a step            {steps.global_batch_size} rows = {steps.local_batch_size} rows × "
        f"{steps.global_batch_size // steps.local_batch_size} micro-batches{processes}, at most "
        f"{steps.global_batch_size * length:,} tokens",
        f"estimated memory  {estimate.total / gib:.2f} GiB = weights {estimate.weights / gib:.2f} + gradients "
        f"{estimate.gradients / gib:.2f} + the loss's of the head {estimate.head / gib:.2f} + AdamW "
        f"{estimate.optimizer / gib:.2f} + activations at {length} tokens {estimate.activations / gib:.2f}",
    ]


def _ends(parts: Parts) -> str:
    words = parts.tokenizer.convert_ids_to_tokens(list(parts.stop_ids))
    return " or ".join(word or f"token {token}" for word, token in zip(words, parts.stop_ids, strict=True))


def _shared(prepared: Prepared, one: SharedEstimate) -> list[str]:
    gib, degrees = 2**30, prepared.degrees
    return [
        f"processes         {degrees.world} = {degrees.replicate} copies × {degrees.shard} that share one"
        + (f", experts over {degrees.experts} of them" if degrees.experts > 1 else ""),
        f"a process holds   {one.total / gib:.2f} GiB = weights {one.weights / gib:.2f} + gradients "
        f"{one.gradients / gib:.2f} + the loss's of the head {one.head / gib:.2f} + AdamW {one.optimizer / gib:.2f} + "
        f"gathered {one.gathered / gib:.2f} + activations {one.activations / gib:.2f}",
        f"and receives      {one.received / gib:.2f} GiB a step = weights {one.weights_received / gib:.2f} + gradients "
        f"{one.gradients_received / gib:.2f} + tokens {one.tokens_received / gib:.2f}",
    ]


def _clean(batch: Batch, row: int, tokenizer: Any) -> Text:
    attended = batch.attention_mask_BL[row].tolist()
    marks = ["green" if s else "" for s in batch.supervised_BL[row].tolist()]
    return _pieces(batch.input_ids_BL[row].tolist(), marks, attended, tokenizer)


def _pieces(ids: list[int], styles: list[str], attended: list[bool], tokenizer: Any) -> Text:
    """Decode runs of equally styled tokens together, since a character may be spread over several tokens."""
    text = Text()
    shown = [(token, style) for token, style, seen in zip(ids, styles, attended, strict=True) if seen]
    for style, run in groupby(shown, key=lambda item: item[1]):
        ids_of_run = [token for token, _ in run]
        text.append("░" * len(ids_of_run) if style == HIDDEN else tokenizer.decode(ids_of_run), style=style)
    return text
