from __future__ import annotations

import numpy as np
import torch

from unmask.ops.padding import padded


def test_rows_keep_their_values_and_padding_is_told_from_them() -> None:
    values, present = padded([[1, 2, 3], [], np.array([4])], fill=9)
    assert values.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]] and values.dtype == torch.int64
    assert present.tolist() == [[True] * 3, [False] * 3, [True, False, False]]


def test_the_fill_gives_the_type_and_a_width_may_be_asked_for() -> None:
    values, present = padded([np.array([True])], fill=False, width=2)
    assert values.tolist() == present.tolist() == [[True, False]] and values.dtype == torch.bool
    assert [each.shape for each in padded([])] == [(0, 0)] * 2
