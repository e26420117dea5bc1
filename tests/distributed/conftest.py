"""Several ranks in one test: processes forked from a server that has imported torch once, which takes the seconds.

A module that says `ON_EVERY_DEVICE = True` runs on CPUs through gloo and, under `make gpus`, on CUDA devices through
NCCL, by the same functions.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `rank_entry` and `rank_programs`, imported by name


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames and getattr(metafunc.module, "ON_EVERY_DEVICE", False):
        places = ["cpu", pytest.param("cuda", marks=pytest.mark.gpus)]
        metafunc.parametrize("device", places, indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the ranks compute; a test that asks for more CUDA devices than there are is skipped."""
    place = getattr(request, "param", "cpu")
    need_devices(place, 2)
    return place


def need_devices(place: str, count: int) -> None:
    if place == "cuda":
        import torch

        if torch.cuda.device_count() < count:
            pytest.skip(f"{torch.cuda.device_count()} CUDA devices: this check needs {count}")


@pytest.fixture(scope="session")
def tiny(tiny: Any, device: str) -> Any:
    """The small files, with runs on that device, in fp32, so that what is equal on CPUs is so there."""
    placed = copy.copy(tiny)
    placed.placed = {"device": device} if device == "cpu" else {"device": device, "autocast_dtype": "float32"}
    return placed


@pytest.fixture(scope="session")
def start_ranks(device: str) -> Callable[..., list[Any]]:
    """Return a function that starts ranks of a program of `rank_programs` and returns the processes and their notes."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_programs"])
    before = os.environ.get("PYTHONPATH")
    # The server takes over no sys.path before Python 3.13, and says nothing of what it could not import.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)

    stores = []

    def start(folder: Path, size: int, program: str, *arguments: Any) -> list[Any]:
        import rank_entry
        from torch.distributed import TCPStore

        need_devices(device, size)
        folder.mkdir(parents=True, exist_ok=True)
        # As under torchrun, whose agent keeps the store: it outlives every rank.
        stores.append(TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False))
        port = stores[-1].port
        processes = []
        for rank in range(size):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
            process = context.Process(
                target=rank_entry.main, args=(environment, str(folder / f"rank{rank}"), program, arguments)
            )
            process.start()
            processes.append(process)
        return processes

    return start


@pytest.fixture(scope="session")
def run_ranks(
    start_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Any]]:
    """Return a function that runs a program on some ranks and returns what each rank returned."""

    def run(size: int, program: str, *arguments: Any, seconds: float = 100) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        processes = start_ranks(folder, size, program, *arguments)
        for process in processes:
            process.join(seconds)
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        said = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("rank*.err")))
        assert not stuck, f"ranks {stuck} hang\n{said}"
        assert [process.exitcode for process in processes] == [0] * size, said
        return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(size)]

    return run
