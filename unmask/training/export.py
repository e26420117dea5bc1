"""`unmask export`: a plain Hugging Face folder that every loader of the family reads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError

from unmask.errors import CheckpointError, ModelError
from unmask.models.folders import ADAPTER_CONFIG, base_note, choice_note, find_adapter, stored_tensors
from unmask.models.manifest import intact
from unmask.models.registry import ModelPlan, plan_folder
from unmask.models.tokenizer import load_tokenizer, tokenizer_folder
from unmask.places import hold, lock_beside, part_of, user_path

# A tensor of one of a stack's layers.
_LAYER = re.compile(r"(?P<stack>.*\.(?:layers|blocks))\.(?P<layer>\d+)\.(?P<name>.+)")


def export(
    checkpoint: str,
    output: Path,
    adapter: str | None = None,
    dtype: str | None = None,
    strip_prefix: bool = False,
    verify: bool = True,
) -> list[str]:
    """Write model, config, tokenizer and chat template; written beside `output` and renamed when complete.

    Args:
        checkpoint: a folder, run directory or hub id.
        output: a folder that does not exist yet, or an empty one.
        adapter: LoRA adapter to merge into the weights.
        dtype: dtype of the written weights; None = as stored.
        strip_prefix: whether the tensors have a wrapper's names, such as `_orig_mod.`, which are taken off.
        verify: whether a run's checkpoint and adapter must be as their manifest says.

    Returns:
        warnings for the user, one line each.

    Raises:
        ModelError: the checkpoint or adapter cannot be used.
        CheckpointError: `output` is taken or cannot be written; nothing half-written is left.
    """
    output = user_path(output, "--output")
    with hold(lock_beside(output), "--output", output, "writes"):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"--output: {output} exists and is not empty; choose a new folder")
        plan, adapter_folder, notes = plan_folder(checkpoint, "--checkpoint"), None, []
        if adapter is not None:
            adapter_folder = find_adapter(adapter)
            choice = choice_note(user_path(adapter, "adapter"), adapter_folder, ADAPTER_CONFIG)
            notes = [choice, base_note(adapter_folder, Path(str(plan.folder)))]
        try:
            with part_of(output, folder=True) as part:
                # torch, as nothing is refused now
                from unmask.models.loading import build_model, merged_model, save_model, unwrap_weights

                unwrapped = part / "unwrapped"
                with intact(plan.folder, verify), intact(adapter_folder, verify):
                    if strip_prefix:
                        unwrapped.mkdir()
                        plan = unwrap_weights(plan, unwrapped)
                    model = build_model(plan, dtype) if adapter is None else merged_model(plan, adapter, dtype)
                    save_model(model, plan, part)
                warnings = [*plan.notes, *(f"--adapter: {note}" for note in notes if note)]
                warnings += [*_copy_tokenizer(checkpoint, adapter, part), *_incomplete(checkpoint, plan)]
                shutil.rmtree(unwrapped, ignore_errors=True)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports the former
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            if (name := getattr(error, "filename", None)) not in (None, str(output)):
                reason = f"{name}: {reason}"
            raise CheckpointError(
                f"--output: {output} cannot be written ({reason}); nothing of it was left, choose another place"
            ) from None
    return warnings


def _incomplete(checkpoint: str, plan: ModelPlan) -> list[str]:
    """Warn of a checkpoint that lost what training carries along unread: all of it, or tensors of single layers."""
    part = plan.family.files.passthrough_part
    if not part or plan.folder is None:
        return []
    keys = [key for key in stored_tensors(plan.folder) if plan.family.files.passthrough(key)]
    if not keys:
        return [
            f"{checkpoint} has no {part}, so the exported folder has none either, and transformers would draw it "
            "at random; text is complete"
        ]
    lost = layer_gaps(keys)
    if not lost:
        return []
    more = f" and {len(lost) - 1} more tensors of its {part}" if len(lost) > 1 else ""
    return [
        f"{checkpoint} lacks {lost[0]}{more}, so the exported folder lacks them as well, and transformers would draw "
        "them at random; text is complete"
    ]


def layer_gaps(keys: Iterable[str]) -> list[str]:
    """Return the keys that a numbered layer lacks and another layer beside it has, sorted.

    All layers of one stack (`….layers.N.…`) are taken to be alike. What lies beside them is not missed, nor are layers
    at the end of a stack that are gone whole, or a tensor that every layer lacks.
    """
    stacks: dict[str, dict[int, set[str]]] = {}
    for key in keys:
        if match := _LAYER.fullmatch(key):
            stacks.setdefault(match["stack"], {}).setdefault(int(match["layer"]), set()).add(match["name"])
    return sorted(
        f"{stack}.{layer}.{name}"
        for stack, layers in stacks.items()
        for layer in range(max(layers) + 1)
        for name in set().union(*layers.values()) - layers.get(layer, set())
    )


def _copy_tokenizer(checkpoint: str, adapter: str | None, folder: Path) -> list[str]:
    try:
        source = tokenizer_folder(checkpoint, adapter)
    except ModelError:
        return [f"{checkpoint} has no tokenizer, so the exported folder has none either"]
    load_tokenizer(str(source), "--checkpoint").save_pretrained(folder)
    return []
