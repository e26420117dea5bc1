"""What an error of a collective says: another rank is gone, or what failed on this one, and where its traceback is."""

from __future__ import annotations

from pathlib import Path
from traceback import StackSummary

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from unmask.distributed import failures, shard
from unmask.distributed.failures import cause, keep_tracebacks_in, lost_contact, report_failure
from unmask.distributed.ranks import ALONE

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"
)
FRAMES = (
    "\nException raised from create at /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94 (most recent call "
    "first):\n"
    "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7f in libc10.so)\n"
)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/{}] {}"
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."

# Texts as torch and NCCL write them; from their sources and from issues of NVIDIA/nccl (#795, #1241, #1410, #1514,
# #1928, #2076) and pytorch/pytorch.
LOST = [
    dist.DistBackendError(NCCL.format("remote process exited or there was a network error", REMOTE,
                          "socketProgressOpt: Call to recv failed : Connection reset by peer") + FRAMES),
    dist.DistBackendError(NCCL.format("remote process exited or there was a network error", REMOTE,
                          "NET/IB : Got completion from peer 10.0.0.7<39138> with error 12, opcode 0, len 0")),
    dist.DistBackendError(NCCL.format("internal error", "ncclInternalError: Internal check failed.",
                          "Net : Connection closed by remote peer node7<50260>")),
    dist.DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE, "
                          "NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600013 milliseconds before timing out."),
    dist.DistBackendError("NCCL communicator was aborted on rank 3. "),
    dist.DistBackendError("[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value "
                          "store by key '0', but store->get('0') got error: Connection reset by peer. This may "
                          "indicate a possible application crash on rank 0 or a network set up issue."),
    RuntimeError(GLOO.format("pair.cc:538", "Connection closed by peer [10.0.0.7]:60510")),
    RuntimeError(GLOO.format("pair.cc:538", "Read error [10.0.0.7]:60510: Connection reset by peer")),
    RuntimeError(GLOO.format("unbound_buffer.cc:78", "Timed out waiting 1800000ms for recv operation to complete")),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistNetworkError("failed to recv, got 0 bytes"),
    dist.DistStoreError("wait timeout after 7000ms, keys: /default_pg/0//nokey"),
]  # fmt: skip

# The error, and what must be read in the line that is printed.
OWN = [
    (dist.DistBackendError(NCCL.format("unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
     "ncclUnhandledCudaError: Call to CUDA function failed.", "Cuda failure 2 'out of memory'") + FRAMES),
     "Cuda failure 2 'out of memory'"),
    (dist.DistBackendError(NCCL.format("invalid usage (run with NCCL_DEBUG=WARN for details)",
     "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
     "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")), "Duplicate GPU detected"),
    (dist.DistBackendError(NCCL.format("unhandled system error (run with NCCL_DEBUG=INFO for details)",
     "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
     "socketStartConnect: Connect to 10.0.0.7<45123> failed : Connection refused")), "socketStartConnect"),
    (dist.DistBackendError(NCCL.format("internal error", "ncclInternalError: Internal check failed.",
     "Attribute busid of node nic not found")), "Attribute busid"),
    (dist.DistBackendError(NCCL.format("invalid argument", "ncclInvalidArgument: Invalid value for an argument.",
     "AllReduce : invalid reduction operation 9")), "invalid reduction operation"),
    (dist.DistBackendError("NCCL communicator was aborted on rank 3. Original reason for failure was: " + NCCL.format(
     "unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA function failed.", "Cuda failure 719 'launch'")),
     "Cuda failure 719"),
    (RuntimeError("[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable "
     "to find address for: node7"), "Unable to find address"),
    (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
     "device-side assert"),
    (RuntimeError("Timeout while reading the cache"), "Timeout while reading"),
    (ConnectionResetError("Connection reset by peer"), "reset by peer"),
    (RuntimeError("x" * 5000 + "\nthe last line"), "the last line"),
    (KeyError("weight"), "weight"),
]  # fmt: skip


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-40:])
def test_an_error_of_the_other_side_is_lost_contact(error: Exception) -> None:
    assert lost_contact(error)


@pytest.mark.parametrize(("error", "expected"), OWN, ids=lambda value: str(value)[-40:])
def test_an_error_of_this_side_is_said_with_its_cause(error: Exception, expected: str) -> None:
    assert not lost_contact(error)
    said = cause(error)
    assert expected in said and "\n" not in said and "frame #" not in said and len(said) < 800


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(failures, "_folder", [])
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("in_run", [False, True])
def test_the_message_names_the_file_of_the_traceback(
    two_ranks: Path, capsys: pytest.CaptureFixture[str], in_run: bool
) -> None:
    if in_run:
        (two_ranks / "run").mkdir()
        keep_tracebacks_in(two_ranks / "run")
    try:
        raise OWN[0][0]
    except RuntimeError as error:
        assert report_failure(error) == 1
    (file,) = (two_ranks / "run" if in_run else two_ranks).glob("*.txt")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and "another rank" not in said
    assert said.startswith("unmask: error: rank 1: DistBackendError: NCCL error in") and "out of memory" in said
    kept = file.read_text()
    assert "rank 1 of 2" in kept and "Traceback" in kept and "test_failures.py" in kept and "frame #0" in kept


def test_a_bug_on_a_rank_that_writes_is_raised_as_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def save(*_: object, **__: object) -> None:
        raise CheckpointException("write", {1: (ZeroDivisionError("of rank 1"), StackSummary())})

    monkeypatch.setattr(shard, "save", save)
    with pytest.raises(ZeroDivisionError, match="of rank 1"):
        shard.write_parts({}, tmp_path, ALONE)
