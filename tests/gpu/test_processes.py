"""Process groups on a CUDA device: how long they wait, how they are left, and what NCCL's errors are taken for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from unmask.distributed.processes import Degrees
from unmask.distributed.ranks import build_meshes, leave

pytestmark = pytest.mark.gpu


def test_every_group_on_the_device_waits_as_long_as_the_user_says(tmp_path: Path, cuda: torch.device) -> None:
    store, device = f"file://{tmp_path}/store", torch.device("cuda", 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store, rank=0, world_size=1, device_id=device)
    meshes = build_meshes(Degrees(1, 1, 1), "cuda", timedelta(minutes=7))
    ours = {group.group_name for group in meshes.model.get_all_groups()}
    waits = {group._get_backend(device).options._timeout for group in _world.pg_map if group.group_name in ours}
    assert waits == {timedelta(minutes=7)}
    dist.all_reduce(torch.ones(1, device=device))
    assert leave(30) and not dist.is_initialized()


# Two processes on one device, which NCCL refuses.
TWICE = """
import sys
import torch, torch.distributed as dist
from unmask.distributed.failures import report_failure
from unmask.distributed.ranks import join, leave
try:
    join(torch.device("cuda", 0), 2)
    dist.all_reduce(torch.ones(1, device="cuda:0"))
except Exception as error:
    status = report_failure(error)
    leave(5)
    sys.exit(status)
"""


def test_an_error_of_nccls_own_is_not_a_rank_that_died(tmp_path: Path, cuda: torch.device) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE],
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    errors = [line for line in said.splitlines() if line.startswith("unmask: error: ")]
    assert errors and "another rank died" not in said and all("Duplicate GPU" in line for line in errors), said
    assert all("Traceback" in path.read_text() for path in tmp_path.glob("traceback-rank*.txt"))
