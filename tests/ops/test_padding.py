from __future__ import annotations

import numpy as np
import torch

from unmask.ops.padding import concat_padded, padded


def test_rows_keep_their_values_and_padding_is_told_from_them() -> None:
    values, present = padded([[1, 2, 3], [], np.array([4])], fill=9)
    assert values.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]] and values.dtype == torch.int64
    assert present.tolist() == [[True] * 3, [False] * 3, [True, False, False]]


def test_the_fill_gives_the_type_and_a_width_may_be_asked_for() -> None:
    values, present = padded([np.array([True])], fill=False, width=2)
    assert values.tolist() == present.tolist() == [[True, False]] and values.dtype == torch.bool
    assert [each.shape for each in padded([])] == [(0, 0)] * 2
    assert padded([[], []])[0].shape == (2, 0) and padded([[]])[0].dtype == torch.int64


def test_rows_of_unlike_width_stand_one_behind_the_other_in_any_dimension():
    one, other = torch.ones(2, 3), torch.full((1, 1), 2.0)
    assert concat_padded([one, other], -1).tolist() == [[1, 1, 1], [1, 1, 1], [2, -1, -1]]
    deep = concat_padded([torch.ones(1, 2, 1, 4), torch.ones(2, 2, 3, 4)], dim=2)
    assert deep.shape == (3, 2, 3, 4) and deep[0, :, 1:].eq(0).all() and deep[1:].eq(1).all()
    assert concat_padded([torch.tensor([[True]]), torch.ones(1, 2, dtype=torch.bool)]).dtype == torch.bool
