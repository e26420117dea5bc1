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
from unmask.config import RunConfig, dump_config
from unmask.data.check import check_rows
from unmask.data.encode import RowEncoder
from unmask.distributed.runtime import pick_device
from unmask.machine import cores
from unmask.models.loading import empty_network
from unmask.models.weights import check_tensors
from unmask.parts import Parts, build_parts, seen_later_turns
from unmask.prepare import Prepared
from unmask.report.progress import checking_rows
from unmask.rng import NoiseStream
from unmask.training.estimate import Estimate, SharedEstimate, estimate_memory, estimate_shared, network_to_count
from unmask.training.needs import Needs, count_needs, shortages
from unmask.training.optim import check_rounding

ROWS = 3
HIDDEN = "dim"  # style of a masked position, drawn as one block of shade
CHANGED = "red"  # style of a token that noise replaced


def show_plan(prepared: Prepared, console: Console) -> None:
    """Print the resolved configuration, sizes, and three training rows clean and corrupted."""
    config, plan = prepared.config, prepared.plan
    device = pick_device(config.distributed.device)
    parts = build_parts(prepared)  # of one process, which composes the same global batches
    checked = _check(prepared, parts, console)
    if plan.folder is not None and plan.hub_id is None:  # of a hub id the weights need not be here
        with torch.device("meta"):
            check_tensors(empty_network(plan.family, plan.config), plan.folder, plan.family.files)
    model = network_to_count(config, plan)
    check_rounding(config.optimizer, model)
    console.print(Rule("configuration"))
    console.print(Syntax(dump_config(config), "yaml", background_color="default"))
    for key in prepared.not_needed:
        console.print(f"not needed here: {key}", markup=False)
    for line in plan.notes:
        console.print(f"warning: {line}", markup=False, highlight=False)
    console.print(Rule("size"))
    estimate, degrees = estimate_memory(config, plan, model, device), prepared.degrees
    shared = estimate_shared(config, plan, model, estimate, degrees, device) if degrees.world > 1 else None
    steps = config.step_scheduler
    total = steps.total_steps(parts.loader.steps_per_epoch)
    lines = [*_sizes(prepared, parts, estimate, total), *checked, *seen_later_turns(prepared, parts.template)]
    if shared is not None:
        lines += _shared(prepared, shared)
    needs = count_needs(config, plan, model, estimate, shared, degrees, device, total)
    lines += _machine(config, needs) + shortages(config, needs, (shared or estimate).total, device)
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
    world = prepared.degrees.world
    skipped, processes = len(prepared.rows.skipped), "" if world == 1 else f" on {world} processes"
    return [
        f"parameters        {estimate.parameters:,} ({estimate.trainable:,} trained)",
        f"rows              {len(prepared.rows):,}" + (f" ({skipped} malformed skipped)" if skipped else ""),
        f"answers end with  {_ends(parts)}",
        f"steps             {total:,} ({parts.loader.steps_per_epoch:,} an epoch)",
        f"a step            {steps.global_batch_size} rows = {steps.local_batch_size} rows × "
        f"{steps.global_batch_size // steps.local_batch_size} micro-batches{processes}, at most "
        f"{steps.global_batch_size * length:,} tokens",
        f"estimated memory  {_sum(estimate, 'weights', 'casts', 'gradients', 'head', 'optimizer', 'activations')}, "
        f"the latter at {length} tokens{_assumed(estimate.context)}",
    ]


def _ends(parts: Parts) -> str:
    words = parts.tokenizer.convert_ids_to_tokens(list(parts.stop_ids))
    return " or ".join(word or f"token {token}" for word, token in zip(words, parts.stop_ids, strict=True))


def _shared(prepared: Prepared, one: SharedEstimate) -> list[str]:
    degrees = prepared.degrees
    return [
        f"processes         {degrees.world} = {degrees.replicate} copies × {degrees.shard} that share one"
        + (f", experts over {degrees.experts} of them" if degrees.experts > 1 else ""),
        f"a process holds   {_sum(one, *_SHARED)}{_assumed(one.context)}"
        + (f", {one.offloaded / 2**30:.2f} of it in host memory" if one.offloaded else ""),
        f"and receives      {one.received / 2**30:.2f} GiB a step = weights {one.weights_received / 2**30:.2f} + "
        f"gradients {one.gradients_received / 2**30:.2f} + tokens {one.tokens_received / 2**30:.2f}",
    ]


# How the parts of an estimate are called.
_NAMES = {
    "casts": "copies of weights for matmuls",
    "head": "the loss's of the head",
    "optimizer": "AdamW",
    "buffers": "buffers of collectives",
}
_SHARED = ("weights", "casts", "gradients", "head", "optimizer", "gathered", "buffers", "activations")


def _sum(estimate: Estimate | SharedEstimate, *names: str) -> str:
    """Return the total and the parts that are not nothing, in GiB."""
    sizes = {name: getattr(estimate, name) / 2**30 for name in names}
    parts = [f"{_NAMES.get(name, name)} {size:.2f}" for name, size in sizes.items() if size or name not in _NAMES]
    return f"{estimate.total / 2**30:.2f} GiB = {' + '.join(parts)}"


def _assumed(context: int) -> str:
    return f" + CUDA's own {context / 2**30:.2f} (assumed)" if context else ""


def _machine(config: RunConfig, needs: Needs) -> list[str]:
    """Say what a run needs of each machine's memory and disk."""
    gib = 2**30
    parts = {"training": needs.training, "loading": needs.loading}
    if needs.loading < needs.staging + needs.writing:  # one after the other
        parts = {"training": needs.training, "pinned copies for saves": needs.staging, "files": needs.writing}
    counted = "".join(f" + {name} {size / gib:.2f}" for name, size in parts.items() if size)
    many = f" for {needs.processes} processes" if needs.processes > 1 else ""
    lines = [
        f"host memory       {needs.host / gib:.2f} GiB{many} = programs {needs.program / gib:.2f} (assumed){counted}"
    ]
    if config.checkpoint.enabled:
        lines.append(
            f"disk              {needs.disk / gib:.2f} GiB: a checkpoint {needs.checkpoint / gib:.2f}, at most "
            f"{needs.kept} at once"
        )
    return lines


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
