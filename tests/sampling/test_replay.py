"""Calls that are recorded on a CUDA device simply run elsewhere."""

from __future__ import annotations

import torch
from torch import nn

from unmask.sampling.replay import Replay, recordable


def test_a_network_on_the_cpu_is_not_recorded():
    assert not recordable(nn.Linear(2, 2))


def test_without_recording_the_function_runs_each_time():
    calls = []

    def double(values):
        calls.append(values)
        return values * 2

    replay = Replay(enabled=False)
    for n in range(4):
        assert replay(double, (torch.tensor([n]),), owner=calls).item() == 2 * n
    assert len(calls) == 4
