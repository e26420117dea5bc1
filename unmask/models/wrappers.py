"""The names that wrappers put around a network's tensors, recognised and taken off: `torch.compile`, DDP, FSDP, PEFT.

No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

# A part of a name → who writes it, anywhere in the name.
_PARTS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "module": "DataParallel, DDP or DeepSpeed",
}
_PEFT = "base_model.model."
_ADAPTED = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")


def without_parts(key: str) -> str:
    """Return a key without the parts that wrappers of single modules write."""
    return ".".join(part for part in key.split(".") if part not in _PARTS)


def network_key(key: str, fits: Callable[[str], bool]) -> str | None:
    """Return the network's key that a wrapped one stands for: the longest end of it that `fits`; None without one.

    Whatever stands in front goes, since any attribute may hold the network (`model.model.…`, `base_model.model.…`).
    """
    name = without_parts(key)
    while name and not fits(name):
        name = name.partition(".")[2]
    return name or None


def misplaced(keys: Iterable[str], fits: Callable[[str], bool]) -> str:
    """Say which wrapper's names a file's keys are, as the end of a message about the file; "" when they are none's."""
    keys = list(keys)
    adapted = next((key for key in keys if any(word in key for word in _ADAPTED)), None)
    if adapted is not None:
        return (
            f"tensor {adapted!r} is of an adapter that PEFT has not merged; merge it (merge_and_unload) and save the "
            "model again, or save the adapter alone and give it as --adapter"
        )
    for key in keys:
        found = None if fits(key) else network_key(key, fits)
        if found is not None:
            wrapper = next((who for part, who in _PARTS.items() if part in key.split(".")), "")
            if not wrapper and key.startswith(_PEFT):
                wrapper = "PEFT"
            return (
                f"tensor {key!r} is {found!r} under a wrapper's name" + f" (of {wrapper})" * bool(wrapper) + "; write "
                "a folder without it: `unmask export --strip-prefix --checkpoint FOLDER --output NEW`"
            )
    return ""
