"""What each collective of a step moves between ranks and how long it takes, at the sizes of a run. Slow.

Bytes are counted as by `unmask/training/estimate.py`; milliseconds are of this machine, shown and not judged.
"""

from __future__ import annotations

import pytest

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`
MB = 2**20
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_collective_brings_what_it_should(run_ranks, measured, device: str, ranks: int) -> None:
    sizes = [MB, 16 * MB] if device == "cpu" else [MB, 64 * MB, 400 * MB]  # the largest: a block of an 8B model in bf16
    every = run_ranks(ranks, "collective_costs", device, sizes)
    share = (ranks - 1) / ranks
    expected = {"all_gather": share, "reduce_scatter": share, "all_reduce": 2 * share, "all_to_all": share}
    for costs in every:
        assert [(cost["name"], cost["size"]) for cost in costs] == [(n, s) for s in sizes for n in expected]
        assert all(cost["right"] for cost in costs)
    for cost in every[0]:
        received = cost["size"] * expected[cost["name"]]
        rate = received / cost["milliseconds"] / 1e6
        measured(
            f"{ranks} ranks on {device}, {cost['name']:15}{cost['size'] / MB:7.0f} MiB: a rank receives "
            f"{received / MB:7.1f} MiB in {cost['milliseconds']:8.2f} ms, {rate:6.2f} GB/s"
        )
