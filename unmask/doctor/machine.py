"""The machine: devices, memory and disk beside what a run needs, and the way to the Hugging Face hub."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants

from unmask.doctor.findings import Finding
from unmask.doctor.subject import Subject
from unmask.machine import available_memory, cores

_SECONDS = 5.0  # how long the hub may take to answer


def check_devices(subject: Subject) -> Iterator[Finding]:
    """Name the devices that torch sees, and a driver whose device it does not see."""
    threads = f"{torch.get_num_threads()} threads of torch on {cores()} cores"
    yield Finding("ok", f"{platform.machine()} CPU, {threads}, {_gb(available_memory())} of memory available")
    if torch.get_num_threads() > cores():
        yield Finding("warning", f"{threads}: they wait for each other", f"set OMP_NUM_THREADS={cores()}")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield Finding("ok", f"cuda:{number}: {properties.name}, {capability}, {_gb(free)} of {_gb(total)} free")
    if torch.cuda.is_available():
        return
    if Path("/proc/driver/nvidia/version").exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding(
            "warning",
            f"an NVIDIA driver is here, and torch {torch.__version__} ({built}) sees no device",
            "install torch for CUDA from https://pytorch.org/get-started, or a newer driver",
        )
    else:
        yield Finding("note", "no CUDA device: everything runs on the CPU")


def device_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def compared(what: str, need: float, have: float, remedy: str) -> Finding:
    """Return whether there is as much as is needed: an error if not, a warning where less than a tenth is left."""
    level = "error" if need > have else "warning" if need > 0.9 * have else "ok"
    return Finding(level, f"{what} {_gb(need)}, of {_gb(have)} free", remedy if level != "ok" else "")


def free_disk(folder: Path) -> int:
    """Return the bytes free where a folder is, or is to be made."""
    place = folder.absolute()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def check_hub(subject: Subject) -> Iterator[Finding]:
    """Say whether the hub answers, who is logged in, and whether a model is here in its newest revision."""
    hub_id = None if subject.plan is None else subject.plan.hub_id
    if hub_id is not None:
        assert subject.plan is not None and subject.plan.folder is not None
        yield Finding("ok", f"{hub_id} is here in revision {subject.plan.folder.name}")
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "not checked: the hub, which HF_HUB_OFFLINE says not to ask")
        return
    try:
        if hub_id is None:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_SECONDS)
            yield Finding("ok", f"{constants.ENDPOINT} answers; {_login()}")
            return
        newest = huggingface_hub.HfApi().model_info(hub_id, timeout=_SECONDS, files_metadata=True)
    except Exception as error:  # the client raises many kinds: no network, a proxy's, gated, missing
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        yield Finding(
            "note" if hub_id is None else "warning",
            f"{constants.ENDPOINT} does not answer as it should ({reason})",
            "work offline with HF_HUB_OFFLINE=1 and local folders, or mend the network or `hf auth login`",
        )
        return
    assert subject.plan is not None and subject.plan.folder is not None
    if newest.sha != subject.plan.folder.name:
        yield Finding("note", f"{hub_id}: the hub has another revision, {newest.sha}; the next download takes it")
    missing = sum(
        each.size or 0
        for each in newest.siblings or ()
        if each.rfilename.endswith(".safetensors") and not (subject.plan.folder / each.rfilename).exists()
    )
    if missing:
        have = free_disk(Path(constants.HF_HUB_CACHE))
        yield compared(f"{hub_id}: weights to download into {constants.HF_HUB_CACHE}", missing, have, "set HF_HOME")
    else:
        yield Finding("ok", f"{hub_id}: the hub answers; all weights are here; {_login()}")


def _login() -> str:
    return "logged in" if huggingface_hub.get_token() else "not logged in, which gated models need (`hf auth login`)"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
