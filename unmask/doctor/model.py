"""A model's files against its network and tokenizer, from headers alone; what it takes; and one forward pass."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from unmask.data.conversation import Message
from unmask.data.template_loading import load_template
from unmask.distributed.runtime import Runtime
from unmask.doctor.findings import Finding
from unmask.doctor.machine import compared, device_memory, free_disk
from unmask.doctor.subject import Subject
from unmask.doctor.trial import finite_loss, ragged_batch
from unmask.errors import UnmaskError
from unmask.machine import available_memory
from unmask.models.folders import INDEX, SHARDED, WEIGHTS, read_generation, stored_tensors
from unmask.models.loading import build_model, empty_network
from unmask.models.manifest import MANIFEST, STATE, intact, read_manifest
from unmask.models.tokenizer import load_tokenizer
from unmask.models.weights import check_tensors
from unmask.parts import build_parts
from unmask.places import user_path
from unmask.sampling.jobs import stop_ids_of
from unmask.training.estimate import estimate_memory, estimate_shared, network_to_count
from unmask.training.needs import count_needs

# What a forward pass may take: a minute goes into reading a file of this size, or drawing this many numbers.
_MOST_READ, _MOST_DRAWN = 20 * 10**9, 5 * 10**8


def check_files(subject: Subject) -> Iterator[Finding]:
    """Compare the tensors of a checkpoint with its network by key, shape and dtype, without reading any."""
    plan = subject.plan
    if plan is None or plan.folder is None:
        return
    for note in plan.notes:
        yield Finding("warning", note)
    if not _has_weights(plan.folder):
        yield Finding("note", f"not checked: the weights of {plan.source}, which are not here")
        return
    with torch.device("meta"):
        check_tensors(empty_network(plan.family, plan.config), plan.folder, plan.family.files)
    dtypes = Counter(stored.dtype for stored in stored_tensors(plan.folder).values())
    counts = ", ".join(f"{count} in {dtype}" for dtype, count in dtypes.most_common())
    what = f"{plan.folder}: every tensor of the network is there in its shape: {counts}"
    yield Finding("ok", f"{what}, {_stored_bytes(plan.folder):,} bytes")
    if "F16" in dtypes:
        yield Finding(
            "warning", "weights in float16 lose small values and overflow beyond 65,504", "load them as bfloat16"
        )
    yield _manifest(plan.folder)


def _manifest(folder: Path) -> Finding:
    """Compare sizes with the manifest of the run that wrote a checkpoint; loading compares checksums."""
    if not (folder / MANIFEST).is_file():
        if (folder / STATE).is_file():
            return Finding("error", f"{folder}: {MANIFEST}, which a run wrote, is missing", "copy it again")
        return Finding("note", f"no {MANIFEST}: not written by a run of unmask, so there is nothing to compare with")
    try:
        files = read_manifest(folder)[1]
        odd = [name for name, (size, _) in files.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not (folder / STATE).is_file():
            return Finding("note", f"{folder / MANIFEST} is another tool's, so there is nothing to compare with")
        return Finding("error", f"{folder / MANIFEST} does not fit the files beside it ({error})", "copy it again")
    if odd:
        return Finding("error", f"{folder}: {odd[0]} has another size than {MANIFEST} says", "copy it again")
    return Finding("ok", f"{len(files)} files have the sizes that {MANIFEST} says; loading compares checksums")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (WEIGHTS, INDEX, SHARDED))


def check_tokenizer(subject: Subject) -> Iterator[Finding]:
    """Check the ids with a meaning against the tokenizer, and that a conversation renders."""
    if subject.prepared is not None:
        parts = build_parts(subject.prepared)
        ends = parts.tokenizer.convert_ids_to_tokens(list(parts.stop_ids))
        yield Finding("ok", f"{parts.template.name} renders and supervises answers, which end with {' or '.join(ends)}")
        return
    plan = subject.plan
    if plan is None or plan.folder is None:
        return
    tokenizer, config = load_tokenizer(str(plan.folder), "doctor"), plan.config
    if len(tokenizer) > config.rows:
        what = f"the tokenizer has {len(tokenizer)} ids, and the embedding {config.rows} rows"
        yield Finding("error", what, "use the tokenizer of this model")
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is None:
            continue
        word = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
        if word is not None and token in special:
            yield Finding("ok", f"{name} {token} is {word!r}")
        elif word is not None:
            what = f"{name} {token} is {word!r}, which ordinary text holds, too"
            yield Finding("error" if name == "mask_token_id" else "warning", what, "correct config.json")
        else:
            yield Finding("warning", f"{name} {token} is no id of the tokenizer, which has {len(tokenizer)}")
    control = [] if config.mask_token_id is None else [config.mask_token_id]
    try:
        template = load_template(tokenizer, None, control, for_training=False)
        text = template.render([Message("user", "Hello?")])
    except UnmaskError as error:
        yield Finding("warning", f"{error} (prompts can be given with --raw)")
        return
    ends = stop_ids_of(config, read_generation(plan.folder), tokenizer, template)
    words = " or ".join(map(str, tokenizer.convert_ids_to_tokens(list(ends))))
    yield Finding("ok", f"{template.name} renders a prompt of {len(text)} characters; answers end with {words}")
    yield _trains(tokenizer, plan.family.chat_template, control)


def _trains(tokenizer: object, packaged: str | None, control: list[int]) -> Finding:
    """Say which template shows a trainer where answers are: the tokenizer's own, or else the family's."""
    try:
        load_template(tokenizer, None, control)
        return Finding("ok", "the tokenizer's chat template can be trained with")
    except UnmaskError as error:
        remedy = "" if packaged is None else f"set dataset.chat_template: {packaged}"
        return Finding("note", str(error).split("; set dataset")[0], remedy)


def check_memory(subject: Subject) -> Iterator[Finding]:
    """Compare what a training step and its checkpoints take with the memory and disk that are here."""
    prepared, plan, device = subject.prepared, subject.plan, subject.device
    if plan is None:
        return
    if prepared is None:
        assert plan.folder is not None
        if _has_weights(plan.folder):
            yield compared(
                f"to answer on {device} the weights take", _stored_bytes(plan.folder), device_memory(device),
                "use --dtype bfloat16, or --nproc-per-node N --shard",
            )  # fmt: skip
        return
    config, degrees = prepared.config, prepared.degrees
    model = network_to_count(config, plan)
    whole = estimate_memory(config, plan, model, device)
    shared = estimate_shared(config, plan, model, whole, degrees, device) if degrees.world > 1 else None
    steps = config.step_scheduler.total_steps(max(1, len(prepared.rows) // config.step_scheduler.global_batch_size))
    needs = count_needs(config, plan, model, whole, shared, degrees, device, steps)
    remedy = "train an adapter (peft), or set distributed.activation_checkpointing: true, or start more processes"
    if device.type == "cuda":
        who = f"by count, each of {degrees.world} processes" if shared else "by count, a step"
        yield compared(f"{who} takes on {device}", (shared or whole).total, device_memory(device), remedy)
    many = f" for {needs.processes} processes" if needs.processes > 1 else ""
    yield compared(f"by count, host memory{many}", needs.host, available_memory(), remedy)
    if config.checkpoint.enabled:
        root = user_path(config.checkpoint.checkpoint_dir, "checkpoint.checkpoint_dir")
        remedy = "lower checkpoint.max_recent_checkpoints, or name another checkpoint.checkpoint_dir"
        yield compared(f"{root}: up to {needs.kept} checkpoints take", needs.disk, free_disk(root), remedy)


def _stored_bytes(folder: Path) -> int:
    files = {chunk.file for stored in stored_tensors(folder).values() for chunk in stored.chunks}
    return sum(file.stat().st_size for file in files)


def check_forward(subject: Subject) -> Iterator[Finding]:
    """Run the network once on a few tokens, if its weights are here and fit."""
    plan, device = subject.plan, subject.device
    if plan is None:
        return
    with torch.device("meta"):
        sizes = [each.numel() for each in empty_network(plan.family, plan.config).parameters()]
    if plan.folder is None:
        need, most = sum(sizes) * 4, _MOST_DRAWN * 4
    elif _has_weights(plan.folder):
        need, most = _stored_bytes(plan.folder), _MOST_READ
    else:
        yield Finding("note", "not done: a forward pass, since the weights are not here")
        return
    have = min(device_memory(device), available_memory())
    if need > min(most, 0.8 * have):
        why = "do not fit in what is free here" if need > 0.8 * have else "take longer to load than this may"
        yield Finding("note", f"not done: a forward pass; weights of {need / 1e9:,.1f} GB {why}")
        return
    runtime = Runtime(device, subject.compute_dtype if subject.compute_dtype == torch.bfloat16 else None)
    with intact(plan.folder):
        model = build_model(plan, None, device)
    batch = ragged_batch(plan.config.vocab_size, 2, min(64, subject.length))
    loss = finite_loss(model, subject.objective, batch, runtime)
    del model
    gc.collect()
    if loss is None:
        yield Finding("error", f"a forward pass on {device} gives a loss that is no number", "copy the weights again")
    else:
        tokens = batch.input_ids_BL.shape[1]
        yield Finding("ok", f"a forward pass on {device} over {tokens} random tokens: loss {loss:.2f}")
